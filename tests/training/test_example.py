"""scripts/train_text_classification.py, from CSV files to a small model."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import datasets
import pytest
import yaml
from from_scripts import load_script
from tiny import VOCABULARY, tiny_tokenizer
from transformers import AutoModelForSequenceClassification, DistilBertConfig, DistilBertForSequenceClassification

ACCURACY = """
import datasets
import evaluate

class Accuracy(evaluate.Metric):
    def _info(self):
        columns = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description="", citation="", inputs_description="", features=datasets.Features(columns)
        )

    def _compute(self, predictions, references):
        return {"accuracy": sum(p == r for p, r in zip(predictions, references)) / len(references)}
"""


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The arguments of a run: a dense model's folder, and two files."""
    folder = tmp_path_factory.mktemp("example")
    config = DistilBertConfig(
        vocab_size=VOCABULARY, dim=48, hidden_dim=80, n_layers=2, n_heads=6, max_position_embeddings=40
    )
    DistilBertForSequenceClassification(config).save_pretrained(folder / "dense")
    tiny_tokenizer().save_pretrained(folder / "dense")
    for name, count in (("train", 48), ("test", 16)):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["text", "label"])
            rows.writerows(
                ["the tide goes out" if i % 2 else "a child counts stones", "tb"[i % 2]] for i in range(count)
            )
    (folder / "own_accuracy.py").write_text(ACCURACY)
    settings = {
        "model_name_or_path": folder / "dense",
        "train_file": folder / "train.csv",
        "validation_file": folder / "test.csv",
        "output_dir": folder / "out",
        "max_length": 16,
        "max_steps": 12,
        "learning_rate": 0.01,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "metrics": folder / "own_accuracy.py",  # as evaluate.load("accuracy") would fetch it from the Hub
    }
    return [str(word) for key, value in settings.items() for word in (f"--{key}", value)]


def test_it_trains_and_saves_a_small_model(words: list[str]) -> None:
    found = load_script("train_text_classification.py").main([*words, "--ratio", "0.4", "--method", "taylor"])
    assert found["eval_accuracy"] == 1.0  # two sentences are told apart
    folder = Path(words[words.index("--output_dir") + 1])
    small = AutoModelForSequenceClassification.from_pretrained(folder)
    dense = AutoModelForSequenceClassification.from_pretrained(words[1])
    blocks = [sum(p.numel() for p in m.distilbert.transformer.parameters()) for m in (small, dense)]
    assert blocks[0] / blocks[1] == pytest.approx(0.6, abs=0.03)
    assert small.config.id2label == {0: "b", 1: "t"} and (folder / "shrink.json").is_file()


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([True, False] * 4, ["false", "true"]),
        ([*range(12)], [str(number) for number in range(12)]),
        ([-1, 2, 10], ["-1", "2", "10"]),
        ([0.5, 1.0], ["0.5", "1"]),
        (["b", "10", "9"], ["10", "9", "b"]),
    ],
    ids=["booleans", "numbers", "gaps", "halves", "words"],
)
def test_labels_of_every_kind_become_classes(
    labels: list[object], names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    file = tmp_path / "rows.json"
    file.write_text("".join(json.dumps({"text": f"row {i}", "label": one}) + "\n" for i, one in enumerate(labels)))
    script = load_script("train_text_classification.py")
    given = script.DataArguments("x", train_file=str(file), validation_file=str(file))
    for rows in script.load_data(given):
        assert rows.features["labels"].names == names
        said = [json.dumps(one).strip('"').removesuffix(".0") for one in labels]
        assert [names[place] for place in rows["labels"]] == said


def test_portable_is_asked_for_by_the_recipe_or_a_flag(tmp_path: Path) -> None:
    script = load_script("train_text_classification.py")
    for said, asked, wanted in ((True, False, True), (False, True, True), (None, True, True), (None, False, False)):
        recipe = {"steps": [{"prune": {"what": "width", "method": "movement", "ratio": 0.5}}]}
        (tmp_path / "own.yaml").write_text(yaml.safe_dump(recipe if said is None else {"portable": said, **recipe}))
        callback = script.ShrinkArguments(recipe=str(tmp_path / "own.yaml"), portable=asked).callback()
        assert callback.recipe.portable is wanted


def test_without_data_it_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--train_file"):
        load_script("train_text_classification.py").main(["--model_name_or_path", "x", "--output_dir", str(tmp_path)])
