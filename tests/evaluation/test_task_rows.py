"""Rows as they come: columns, cells, long texts, models that are broken, and only a part of them."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from tiny import TEXT, tiny_llama, tiny_tokenizer
from tiny_readers import encoder_tokenizer, tiny_bert
from transformers import BertForQuestionAnswering, BertForSequenceClassification, BertForTokenClassification

from hf_shrink.errors import CalibrationError
from hf_shrink.evaluation import evaluate_model
from hf_shrink.evaluation.recipes import TaskRecipe
from hf_shrink.evaluation.rows import columns_of, table_of
from hf_shrink.evaluation.tasks import TASKS


def bert(cls, **changes):
    torch.manual_seed(0)
    config = tiny_bert().config
    config.update(changes)
    return cls(config).eval()


def test_only_what_is_asked_for_changes_how_rows_are_measured(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text, "label": 0}) + "\n" for text in TEXT.split()[:50]))
    model, tokenizer = bert(BertForSequenceClassification), encoder_tokenizer()
    measured = [
        evaluate_model(model, path, tokenizer=tokenizer, spec=spec) for spec in ({"length": 16}, {"samples": 9})
    ]
    assert [result["sequences"] for result in measured] == [50, 9]
    with pytest.raises(CalibrationError, match="stride is between windows of text"):
        evaluate_model(model, path, tokenizer=tokenizer, spec={"stride": 4})
