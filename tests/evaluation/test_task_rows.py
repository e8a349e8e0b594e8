"""Rows as they come: columns, cells, long texts, models that are broken, and only a part of them."""

from __future__ import annotations

import copy
import csv
import dataclasses
import json

import datasets
import numpy as np
import pytest
import torch
from perturbing import perturbed
from tiny import TEXT, tiny_llama, tiny_tokenizer
from tiny_readers import encoder_tokenizer, tiny_bert, tiny_whisper
from transformers import BertForQuestionAnswering, BertForSequenceClassification, BertForTokenClassification

from hf_shrink.errors import CalibrationError, RecipeError
from hf_shrink.evaluation import evaluate_model
from hf_shrink.evaluation.recipes import TaskRecipe
from hf_shrink.evaluation.rows import columns_of, table_of
from hf_shrink.evaluation.tasks import TASKS
from hf_shrink.evaluation.tasks.classification import class_of

SENTENCES = [" ".join(TEXT.split()[start : start + 5]) for start in range(16)]


def bert(cls, **changes):
    torch.manual_seed(0)
    config = tiny_bert().config
    config.update(changes)
    return cls(config).eval()


def classifier(names):
    label2id = {name: number for number, name in enumerate(names)}
    return bert(
        BertForSequenceClassification, id2label=dict(enumerate(names)), label2id=label2id, initializer_range=0.4
    )


def logits_of(model, *texts):
    """Of one text or pair, asked by hand."""
    with torch.no_grad():
        return model(**encoder_tokenizer()(*texts, return_tensors="pt")).logits[0].double()


def chosen(model, *texts):
    return int(logits_of(model, *texts).argmax())


def divergence(dense, model, *texts):
    """KL(dense || model) of the classes."""
    p, q = (logits_of(one, *texts).softmax(-1) for one in (dense, model))
    return (p * (p / q).log()).sum().item()


def write_rows(path, rows):
    """A .jsonl or .csv file."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("names", [["1", "2", "3", "4", "5"], sorted(map(str, range(12)))], ids=["from-1", "as-texts"])
def test_numbers_are_names_where_classes_are_called_so(names, tmp_path):
    model = classifier(names)
    rows = [{"text": text, "label": int(names[chosen(model, text)])} for text in SENTENCES]
    assert len({row["label"] for row in rows}) > 1
    for suffix in (".jsonl", ".csv"):
        path = write_rows(tmp_path / f"rows{suffix}", rows)
        result = evaluate_model(model, path, tokenizer=encoder_tokenizer())
        assert result["model"]["accuracy"]["value"] == 1, suffix
    none = 0 if "0" not in names else len(names)
    with pytest.raises(CalibrationError, match=f"the data has the label {none}, but the model's are"):
        evaluate_model(model, [{"text": "a", "label": none}], tokenizer=encoder_tokenizer())
    # A data set whose own names of its classes the model does not know counts as the model does.
    features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=[f"c{name}" for name in names])}
    columns = {"text": SENTENCES, "label": [chosen(model, text) for text in SENTENCES]}
    data = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    assert evaluate_model(model, data, tokenizer=encoder_tokenizer())["model"]["accuracy"]["value"] == 1


def test_names_that_differ_by_case_alone_are_two_classes():
    model = classifier(["A", "a", "Yes", "true"])
    assert [class_of(label, model) for label in ("A", "a", "yes", True, "TRUE", 2, "3")] == [0, 1, 2, 3, 3, 2, 3]
    with pytest.raises(CalibrationError, match="the data has the label 'NO'"):
        class_of("NO", classifier(["No", "no"]))


def test_lists_of_answers_in_a_csv_are_json(tmp_path):
    answers = ["Paris", "paris, France"]
    asked = TASKS.build("question-answering", {})
    row = {"question": "what", "context": "it is Paris", "answers": json.dumps(answers)}
    others = [{**row, "answers": text} for text in ("Paris", '{"text": ["a"], "answer_start": [3]}', "[unclear]", "7")]
    path = write_rows(tmp_path / "rows.csv", [row, *others])

    def references(path):
        rows = table_of(path, TaskRecipe("x", "question-answering"), 0).of_task(asked, {}, None, tiny_llama())
        return sorted(asked.references(None, rows)["reference_texts"])

    assert references(path) == sorted([answers, ["Paris"], ["a"], ["[unclear]"], ["7"]])
    # JSON lines have lists of their own, so that a text there is a text.
    assert references(write_rows(tmp_path / "rows.jsonl", [row])) == [[json.dumps(answers)]]
    for text in ("['Paris', 'paris']", "{'text': ['a']}"):
        with pytest.raises(CalibrationError, match="answers looks like a list and is not JSON"):
            references(write_rows(path, [{**row, "answers": text}]))


def test_what_a_model_writes_is_compared_with_each_text_of_a_list_in_a_csv(tmp_path):
    model, tokenizer = tiny_llama(), copy.deepcopy(tiny_tokenizer())
    ids = tokenizer("the tide", return_tensors="pt").input_ids
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0)
    text = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    path = write_rows(tmp_path / "rows.csv", [{"text": "the tide", "target": json.dumps(["other", text])}])
    recipe = TaskRecipe("mine", "generation", options={"new": 6})
    result = evaluate_model(model, path, tokenizer=tokenizer, spec=recipe)
    assert result["model"]["exact_match"]["value"] == 1


@pytest.mark.parametrize(
    ("task", "make", "row", "column"),
    [
        ("question-answering", BertForQuestionAnswering, {"question": "a", "context": "b", "answers": "b"}, "answers"),
        ("question-answering", BertForQuestionAnswering, {"question": "a", "context": "b", "answers": "b"}, "context"),
        ("generation", tiny_llama, {"prompt": "a", "target": "b"}, "target"),
        ("generation", tiny_llama, {"prompt": "a", "target": "b"}, "prompt"),
        ("transcription", tiny_whisper, {"audio": "a.wav", "sentence": "b"}, "sentence"),
        ("similarity", tiny_bert, {"sentence1": "a", "sentence2": "b", "score": 1}, "score"),
        ("similarity", tiny_bert, {"sentence1": "a", "sentence2": "b", "score": 1}, "sentence2"),
        ("retrieval", tiny_bert, {"query": "a", "document": "b"}, "query"),
        ("classification", BertForSequenceClassification, {"sentence": "a", "label": 0}, "label"),
        ("classification", BertForSequenceClassification, {"sentence": "a", "label": 0}, "sentence"),
        ("multiple-choice", tiny_llama, {"question": "a", "choices": ["b", "c"], "answer": 0}, "question"),
    ],
)
def test_a_row_with_nothing_where_a_task_reads_is_named(task, make, row, column, tmp_path):
    model = bert(make) if isinstance(make, type) else make()
    tokenizer = tiny_tokenizer() if make is tiny_llama else encoder_tokenizer()
    rows = [row, {**row, column: None, "group": "the one"}]
    with pytest.raises(CalibrationError, match=f"nothing in the column '{column}' of the row with .*the one"):
        evaluate_model(model, rows, tokenizer=tokenizer, spec=TaskRecipe("x", task))
    path = write_rows(tmp_path / "rows.csv", [{**rows[0], "group": ""}, rows[1]])
    with pytest.raises(CalibrationError, match=f"rows.csv has nothing in the column '{column}'"):
        evaluate_model(model, path, tokenizer=tokenizer, spec=TaskRecipe("x", task))


def test_numbers_are_texts_and_what_is_neither_is_refused():
    def references(task, **row):
        return TASKS.build(task, {}).references(None, [row])

    assert references("question-answering", answers=42)["reference_texts"] == [["42"]]
    assert references("generation", target=["b", 0.5])["reference_texts"] == [["b", "0.5"]]
    assert references("similarity", score="2.5")["reference_score"] == [2.5]
    for task, row, message in (
        ("question-answering", {"answers": ["b", None]}, "answers must be a text, not None"),
        ("generation", {"target": {"en": "b"}}, "target must be a text, not {'en': 'b'}"),
        ("transcription", {"text": ["b"]}, "text must be a text"),
        ("similarity", {"score": "high"}, "score must be a number, not 'high'"),
        ("similarity", {"score": float("nan")}, "score must be a number, not nan"),
    ):
        with pytest.raises(CalibrationError, match=message):
            references(task, **row)
    score = bert(BertForSequenceClassification, num_labels=1)
    with pytest.raises(CalibrationError, match="label must be a number, not 'high', in the row with text: 'the tide'"):
        evaluate_model(score, [{"text": "the tide", "label": "high"}], tokenizer=encoder_tokenizer())


def test_a_choice_without_a_context_has_none():
    read = []
    model = tiny_llama()
    model.register_forward_pre_hook(lambda _, args, kwargs: read.append(kwargs["input_ids"]), with_kwargs=True)
    recipe = TaskRecipe("x", "multiple-choice", options={"template": "{context}{question}"})
    row = {"question": "what", "context": None, "choices": ["sand", "stones"], "answer": 0}
    evaluate_model(model, [row], tokenizer=tiny_tokenizer(), spec=recipe)
    assert tiny_tokenizer().decode(read[0][0], skip_special_tokens=True).startswith("what sand")


def test_what_the_columns_are_does_not_depend_on_the_order(tmp_path):
    model, tokenizer = classifier(["b", "c"]), encoder_tokenizer()
    rows = [{"text": text, "label": "b", **({"group": "g"} if i == 7 else {})} for i, text in enumerate(SENTENCES[:8])]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    for seed in range(4):
        result = evaluate_model(model, path, tokenizer=tokenizer, seed=seed)
        assert result["groups"]["accuracy"]["by_group"]["g"]["rows"] == 1
        assert list(result["groups"]["accuracy"]["by_group"]) == ["g"], "rows without a group are in none"
    del rows[3]["label"]
    write_rows(path, rows)
    for seed in range(4):
        with pytest.raises(CalibrationError, match="nothing in the column 'label'"):
            evaluate_model(model, path, tokenizer=tokenizer, seed=seed)


def test_rows_with_and_without_a_pair_are_read_as_they_are(tmp_path):
    model, tokenizer = classifier(["b", "c", "d"]), encoder_tokenizer()
    pairs = [(text, SENTENCES[-i]) if i % 3 else (text,) for i, text in enumerate(SENTENCES, start=1)]
    other = perturbed(model, 0.3)
    expected = np.mean([divergence(other, model, *both) for both in pairs])
    rows = [
        {"text": both[0], "pair": both[1] if len(both) > 1 else None, "label": "bcd"[chosen(model, *both)]}
        for both in pairs
    ]
    for path in (write_rows(tmp_path / f"rows{suffix}", rows) for suffix in (".jsonl", ".csv")):
        for batch_size in (1, 2, 16):
            spec = {"batch_size": batch_size}
            figures = evaluate_model(model, path, baseline=other, tokenizer=tokenizer, spec=spec)["model"]
            assert figures["accuracy"]["value"] == 1
            assert figures["kl_divergence"]["value"] == pytest.approx(expected, rel=1e-4), (path.suffix, batch_size)


def test_more_cells_than_columns_are_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\none, two,b\n")
    with pytest.raises(CalibrationError, match="more cells than columns in the row with text: 'one'"):
        evaluate_model(classifier(["b", "c"]), path, tokenizer=encoder_tokenizer())


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
