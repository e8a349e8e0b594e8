"""Tensors of a checkpoint that its class has no place for are named, and nothing is saved by leaving them out."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.cases_mixtures import MIXTURES
from safetensors.torch import load_file, save_file
from tiny import tiny_llama

from hf_shrink import shrink_checkpoint
from hf_shrink.checkpoint.left_out import LeftOut, left_out
from hf_shrink.checkpoint.source import load_source_model, model_class, open_source
from hf_shrink.cli import main
from hf_shrink.pipeline import checkpointing

HEADS = {f"model.layers.{i}.mtp.weight": torch.ones(64, 64) for i in (4, 5, 11)}
EXTRA = {**HEADS, "value_head.weight": torch.ones(3, 48, dtype=torch.bfloat16)}
IGNORED = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    tiny_llama(num_hidden_layers=2).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def with_more(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A copy of a checkpoint with more tensors in its file."""
    found = Path(shutil.copytree(folder, folder.parent / "more"))
    weights = load_file(found / "model.safetensors")
    save_file({**weights, **tensors}, found / "model.safetensors", metadata={"format": "pt"})
    return found


def test_they_are_named_and_their_bytes_known(dense: Path) -> None:
    source = open_source(with_more(dense, {**EXTRA, **IGNORED}))
    found = left_out(source, load_source_model(source))
    assert found == LeftOut(tuple(EXTRA), sum(tensor.nbytes for tensor in EXTRA.values()), 8 * 4)
    assert found.note is not None
    assert found.note.startswith("4 tensors of the source (0.04944 MB)")
    assert found.note.endswith(
        "model.layers.4.mtp.weight, model.layers.5.mtp.weight, model.layers.11.mtp.weight and 1 more"
    )


def test_what_the_class_says_to_ignore_is_not_spoken_of(dense: Path) -> None:
    source = open_source(with_more(dense, IGNORED))
    assert left_out(source, load_source_model(source)) == LeftOut(ignored=8 * 4)
    assert LeftOut(ignored=8 * 4).note is None


@pytest.mark.parametrize("name", sorted(MIXTURES))
def test_they_are_those_of_which_stock_warns_also_where_it_renames_or_merges(name: str, tmp_path: Path) -> None:
    MIXTURES[name]().save_pretrained(tmp_path / "dense")
    source = open_source(tmp_path / "dense")
    assert left_out(source, load_source_model(source)) == LeftOut()
    weights = load_file(tmp_path / "dense" / "model.safetensors")
    further = {key.replace("layers.0.", "layers.77."): t.clone() for key, t in weights.items() if "layers.0." in key}
    source = open_source(with_more(tmp_path / "dense", further))
    model, info = model_class(source).from_pretrained(source.folder, output_loading_info=True)
    found = left_out(source, model)
    assert set(found.names) == set(further) and info["unexpected_keys"]
    assert found.bytes == sum(tensor.nbytes for tensor in further.values())


@pytest.mark.parametrize("memory", ["4GB", 0])
def test_a_run_says_so_and_does_not_count_them_as_saved(
    dense: Path, memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpointing, "write_report", lambda *given, **named: None)
    recipe = {"steps": [{"quantize": {"method": "rtn", "group_size": 16}}], "evaluation": {"metrics": []}}
    reports = [
        shrink_checkpoint(folder, tmp_path / f"out-{folder.name}", recipe, max_memory=memory, progress=False)
        for folder in (dense, with_more(dense, EXTRA))
    ]
    without, report = reports
    assert any(note.startswith("4 tensors of the source") for note in report.notes)
    assert without.notes == [note for note in report.notes if "of the source" not in note]
    names = 150 * len(EXTRA)  # entries in the header
    assert without.bytes_before <= report.bytes_before < without.bytes_before + names
    assert report.bytes_after == without.bytes_after


def test_a_plan_says_so(dense: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", str(with_more(dense, EXTRA)), "--quiet", "--effort", "fast", "--set", "quantize.group_size=16"]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert "4 tensors of the source" in captured.err
