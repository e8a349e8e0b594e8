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

from hf_shrink.errors import CalibrationError, RecipeError
from hf_shrink.evaluation import evaluate_model
from hf_shrink.evaluation.recipes import TaskRecipe
from hf_shrink.evaluation.rows import columns_of, table_of
from hf_shrink.evaluation.tasks import TASKS


def bert(cls, **changes):
    torch.manual_seed(0)
    config = tiny_bert().config
    config.update(changes)
    return cls(config).eval()


def test_columns_of_pairs_belong_together():
    task, label = TASKS.build("classification", {}), ("label",)
    for columns in (("question", "sentence"), ("sentence1", "sentence2"), ("premise", "hypothesis")):
        found = columns_of(task, ("text", *columns, *label), {})
        assert (found["text"], found["pair"], found["label"]) == (*columns, "label")
    assert columns_of(task, ("sentence", "label"), {}) == {"text": "sentence", "label": "label"}
    assert columns_of(task, ("question", "sentence", "label"), {"text": "sentence"})["text"] == "sentence"


def test_a_csv_holds_ends_of_lines_and_lists(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('question,choices,answer\n"one\ntwo\u2028three","[""sand"", ""stones""]",1\nfour,"ab",0\n')
    rows = list(table_of(path, TaskRecipe("x", "multiple-choice"), 0).rows)
    assert sorted(row["question"] for row in rows) == ["four", "one\ntwo\u2028three"]
    model, tokenizer, recipe = tiny_llama(), tiny_tokenizer(), TaskRecipe("x", "multiple-choice")
    good, bad = (next(row for row in rows if row["answer"] == answer) for answer in "10")
    as_list = {**good, "choices": ["sand", "stones"]}
    asked, expected = (evaluate_model(model, [row], tokenizer=tokenizer, spec=recipe) for row in (good, as_list))
    assert asked["model"] == expected["model"]
    with pytest.raises(CalibrationError, match="choices must be a list, not the text 'ab'; write it as JSON"):
        evaluate_model(model, [bad], tokenizer=tokenizer, spec=recipe)
    names = {0: "O", 1: "B-PER"}
    tagger = bert(BertForTokenClassification, id2label=names, label2id={name: i for i, name in names.items()})
    words = [{"tokens": '["the", "tide"]', "tags": '["O", "B-PER"]'}]
    assert evaluate_model(tagger, words, tokenizer=encoder_tokenizer())["task"] == "token-classification"
    with pytest.raises(CalibrationError, match="tokens must be a list"):
        evaluate_model(tagger, [{"tokens": "the tide", "tags": [0, 1]}], tokenizer=encoder_tokenizer())


@pytest.mark.parametrize("task", ["classes", "choices", "tags", "stretches"])
def test_nan_is_no_answer(task):
    """The largest of NaN is an ordinary class."""
    row = {
        "classes": {"text": "the tide", "label": 0},
        "choices": {"question": "what", "choices": ["sand", "stones"], "answer": 0},
        "tags": {"tokens": ["the", "tide"], "tags": [0, 0]},
        "stretches": {"question": "what", "context": "the tide goes out", "answers": ["tide"]},
    }[task]
    heads = {"classes": BertForSequenceClassification, "tags": BertForTokenClassification}
    model = tiny_llama() if task == "choices" else bert(heads.get(task, BertForQuestionAnswering))
    tokenizer = tiny_tokenizer() if task == "choices" else encoder_tokenizer()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "norm" in n.lower()).fill_(float("nan"))
    spec = TaskRecipe("x", "multiple-choice") if task == "choices" else None
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        evaluate_model(model, [row], tokenizer=tokenizer, spec=spec)


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


def test_names_in_place_of_the_usual_that_mean_nothing_are_refused(tmp_path):
    model, tokenizer = bert(BertForSequenceClassification), encoder_tokenizer()
    (tmp_path / "text.txt").write_text(TEXT)
    for data in (tmp_path / "text.txt", "classification"):
        with pytest.raises(RecipeError, match="unknown key 'lenght' in spec; did you mean 'length'"):
            evaluate_model(model, data, tokenizer=tokenizer, spec={"lenght": 4})
    with pytest.raises(CalibrationError, match="classification is rows with answers"):
        evaluate_model(model, "classification", tokenizer=tokenizer, spec={"stride": 4})
