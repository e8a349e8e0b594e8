from __future__ import annotations

from pathlib import Path

import datasets
import pytest
import torch
import yaml
from tiny import tiny_llama, tiny_tokenizer

from hf_shrink import resources
from hf_shrink.calibration.data import CalibrationData, calibration_batches
from hf_shrink.calibration.recipes import load_recipe, recipe_names
from hf_shrink.errors import CalibrationError, RecipeError
from hf_shrink.recipe import CalibrationSpec

TEXTS = [f"Row {i} tells of {i * 7 % 13} boats and {i * 11 % 17} gulls." for i in range(60)]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    # The library waits five seconds after every shuffled stream, for a bug of pyarrow that local files do not have.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


def local_recipe(folder: Path, splits: dict[str, list[str]], **keys: object) -> str:
    """A data recipe over a local folder with one parquet file a split."""
    data = folder / "set"
    data.mkdir()
    for split, texts in splits.items():
        datasets.Dataset.from_dict({"body": texts}).to_parquet(data / f"{split}.parquet")
    path = folder / "local.yaml"
    path.write_text(yaml.safe_dump({"kind": "text", "dataset": str(data), "columns": ["body"], **keys}))
    return str(path)


def read(source: str, **options: object) -> CalibrationData:
    options = {"model": tiny_llama(), "tokenizer": tiny_tokenizer(), **options}
    return calibration_batches(CalibrationSpec(source, samples=6, length=32, batch_size=4), **options)


def rows_named(data: CalibrationData) -> set[str]:
    text = " ".join(data.texts(tiny_tokenizer())).replace("</s>", " ")
    return {piece.split(" tells")[0] for piece in text.split("Row ") if " tells" in piece}


def test_every_built_in_recipe_is_valid():
    assert {"self", "wikitext", "c4", "pile-10k", "ultrachat", "code", "multilingual"} <= set(recipe_names())
    kinds = {load_recipe(name).kind for name in recipe_names()}
    assert kinds == {"self", "text", "chat", "image", "audio"}
    for name in recipe_names():
        assert load_recipe(name).description.endswith(".")


def test_recipes_are_found_inside_an_installed_package_too(tmp_path, monkeypatch):
    source = resources.recipes_folder("calibration")
    monkeypatch.setattr(resources, "_PACKAGE", tmp_path / "hf_shrink")
    with pytest.raises(RecipeError, match="missing"):
        resources.recipes_folder("calibration")
    (tmp_path / "hf_shrink" / "recipes").mkdir(parents=True)
    (tmp_path / "hf_shrink" / "recipes" / "calibration").symlink_to(source)
    assert resources.recipes_folder("calibration") == tmp_path / "hf_shrink" / "recipes" / "calibration"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_is_read_through_the_datasets_library(tmp_path, streaming):
    recipe = local_recipe(
        tmp_path, {"train": TEXTS[:40], "test": TEXTS[40:]}, evaluation_split="test", streaming=streaming
    )
    data = read(recipe)
    assert [len(b["input_ids"]) for b in data.batches] == [4, 2]
    assert data.description == "6 x 32 tokens of local" and data.details["split"] == "train"
    assert rows_named(data) and all(int(name) < 40 for name in rows_named(data))
    again, other = read(recipe), read(recipe, seed=5)
    assert torch.equal(data.batches[0]["input_ids"], again.batches[0]["input_ids"])
    assert not torch.equal(data.batches[0]["input_ids"], other.batches[0]["input_ids"])
    evaluation = read(recipe, purpose="evaluation")
    assert rows_named(evaluation) and all(int(name) >= 40 for name in rows_named(evaluation))


@pytest.mark.parametrize("streaming", [False, True])
def test_without_an_evaluation_split_evaluation_reads_other_rows(tmp_path, monkeypatch, streaming):
    monkeypatch.setattr("hf_shrink.calibration.recipes._STREAM_SHARE", 30)
    recipe = local_recipe(tmp_path, {"train": TEXTS}, streaming=streaming)
    calibration, evaluation = rows_named(read(recipe)), rows_named(read(recipe, purpose="evaluation"))
    assert calibration and evaluation and calibration.isdisjoint(evaluation)


def test_joined_rows_are_one_text_in_order(tmp_path):
    recipe = local_recipe(tmp_path, {"train": TEXTS}, join="\n")
    ids = tiny_tokenizer()("\n".join(TEXTS), add_special_tokens=False, verbose=False)["input_ids"]
    assert torch.cat([b["input_ids"] for b in read(recipe).batches]).flatten().tolist() == ids[: 6 * 32]


def test_an_unknown_name_names_the_nearest():
    with pytest.raises(CalibrationError, match="did you mean 'wikitext'"):
        read("wikitxt")
    with pytest.raises(CalibrationError, match="did you mean 'self'"):
        read("slef")


def test_offline_says_how_to_go_on(tmp_path):
    path = tmp_path / "far.yaml"
    path.write_text("kind: text\ndataset: nobody-at-all/no-such-data-set\n")
    # HF_HUB_OFFLINE is set for all tests.
    with pytest.raises(CalibrationError, match=r"cannot load data 'far'.*--calibration self.*HF_HOME"):
        read(str(path))
    for name in ("wikitext", "c4"):
        with pytest.raises(CalibrationError, match="--calibration self"):
            read(name)


def test_a_local_folder_that_cannot_be_read_says_the_cause_and_nothing_of_the_network(tmp_path):
    recipe = local_recipe(tmp_path, {"train": TEXTS})
    (tmp_path / "set" / "train.parquet").write_bytes(b"this is no parquet file")
    with pytest.raises(
        CalibrationError, match=r"cannot load data 'local'.*Parquet magic bytes not found.*Check"
    ) as error:
        read(recipe)
    assert "network" not in str(error.value) and "HF_HOME" not in str(error.value)


def test_a_missing_split_and_a_missing_column_are_errors(tmp_path):
    recipe = local_recipe(tmp_path, {"train": TEXTS}, split="tset")
    with pytest.raises(CalibrationError, match="tset"):
        read(recipe)
    Path(recipe).write_text(Path(recipe).read_text().replace("tset", "train").replace("- body", "- bodi"))
    with pytest.raises(CalibrationError, match="no column 'bodi'; did you mean 'body'"):
        read(recipe)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: tetx\ndataset: a", "did you mean 'text'"),
        ("kind: text", "needs `dataset`"),
        ("kind: text\ndataset: a\ncolum: b", "did you mean 'columns'"),
        ("kind: text\ndataset: a\ncolumns: b", "list of names"),
        ("kind: self\ntemperature: 0", "above 0"),
        ("kind: self\nchat_share: 2", "between 0 and 1"),
        ("- a", "mapping"),
        ("kind: [", "not valid YAML"),
    ],
)
def test_invalid_recipes_are_errors(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        read(str(path))


def test_a_recipe_of_ones_own_sets_the_temperature(tmp_path):
    path = tmp_path / "cool.yaml"
    path.write_text("kind: self\ntemperature: 0.5\n")
    assert read(str(path)).details["temperature"] == 0.5
