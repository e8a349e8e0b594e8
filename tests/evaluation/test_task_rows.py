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


def test_a_long_text_leaves_the_template_whole():
    model, tokenizer = tiny_llama(), copy.deepcopy(tiny_tokenizer())
    read = []
    model.register_forward_pre_hook(lambda _, args, kwargs: read.append(kwargs["input_ids"]), with_kwargs=True)
    rows = [{"text": TEXT, "target": "sand"}]
    template = "Read this: {text}\nWho walks? Answer:"
    recipe = TaskRecipe("mine", "generation", options={"new": 4, "template": template}, length=48)
    evaluate_model(model, rows, tokenizer=tokenizer, spec=recipe)
    prompt = tokenizer.decode(read[0][0])
    assert prompt.startswith("Read this: The tide") and prompt.endswith("Who walks? Answer:")
    assert 40 <= read[0].shape[1] <= 44
    with pytest.raises(CalibrationError, match="leaves no room"):
        evaluate_model(model, rows, tokenizer=tokenizer, spec=dataclasses.replace(recipe, length=8))


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
