"""Runs that are cut off at awkward moments, and outputs that would cost something if they were written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_llama, tiny_tokenizer

from hf_shrink import shrink_checkpoint
from hf_shrink.checkpoint import folder as folder_module
from hf_shrink.checkpoint.journal import Journal
from hf_shrink.cli import main
from hf_shrink.errors import CheckpointError
from hf_shrink.pipeline import checkpointing
from hf_shrink.pipeline.keeping import JournalKeeper


class Killed(BaseException):
    """Nothing catches it."""


@pytest.fixture(autouse=True)
def _without_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpointing, "write_report", lambda *given, **named: None)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "dense"
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def recipe(**changes: Any) -> dict[str, Any]:
    step = {"scheme": "W4A16", "group_size": 16, "method": "rtn", **changes}
    return {"portable": False, "steps": [{"quantize": step}], "evaluation": {"metrics": []}}


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def bits(folder: Path) -> set[int]:
    return {scheme["bits"] for scheme in json.loads((folder / "shrink.json").read_text())["plan"]["schemes"].values()}


def test_after_the_last_block_what_comes_behind_it_is_the_same(source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Finished blocks are packed, and how many batches are followed is decided by what they were."""
    draw = torch.Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(3, 300, (2, 24), generator=draw)} for _ in range(6)]
    asked = recipe(method="gptq", head="W8A16")
    arguments: dict[str, Any] = {"calibration": data, "max_memory": 0, "progress": False}
    shrink_checkpoint(source, tmp_path / "whole", asked, **arguments)
    finished, real = [0], JournalKeeper.finished

    def dies(self: Any, *given: Any, **named: Any) -> None:
        real(self, *given, **named)
        finished[0] += 1
        if finished[0] == tiny_llama().config.num_hidden_layers:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(JournalKeeper, "finished", dies)
        shrink_checkpoint(source, tmp_path / "cut", asked, **arguments)
    shrink_checkpoint(source, tmp_path / "cut", asked, **arguments)
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


@pytest.mark.parametrize("inside", ["", "deeper"])
def test_a_source_in_the_place_of_its_result_is_not_overwritten(inside: str, source: Path) -> None:
    shutil.copy(source / "config.json", source.parent)  # so that the folder around it looks like a model
    before = weights(source)
    output = source if not inside else source.parent
    with pytest.raises(CheckpointError, match="overwritten by its own result"):
        shrink_checkpoint(source, output, recipe(), overwrite=True, progress=False)
    assert weights(source) == before
    assert sorted(os.listdir(source.parent)) == ["config.json", "dense"]


def test_what_is_measured_on_another_text_is_another_run(source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven eight nine ten. " * 40)
    asked = {**recipe(), "evaluation": {"data": str(text), "metrics": ["perplexity"], "samples": 2, "length": 16}}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpointing, "measure", lambda *given: (_ for _ in ()).throw(Killed()))
        shrink_checkpoint(source, tmp_path / "out", asked, progress=False)
    text.write_text("ten nine eight seven six five four three two one. " * 40)
    with pytest.raises(CheckpointError, match=r"file \S*text.txt was"):
        shrink_checkpoint(source, tmp_path / "out", asked, progress=False)


@pytest.mark.parametrize("kind", ["texts of the vocabulary", "a data set in a folder"])
def test_other_texts_are_another_run(kind: str, source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    text = folder / "train.txt"
    text.write_text("The tide goes out and leaves the sand in ridges. " * 40)
    asked = recipe(method="gptq")
    if kind == "a data set in a folder":
        mine = tmp_path / "mine.yaml"
        mine.write_text(f"{{kind: text, dataset: {folder}, columns: [text]}}")
        asked["calibration"] = {"data": str(mine), "samples": 2, "length": 16}
    else:
        step = {"what": "vocabulary", "method": "seen", "texts": [str(text)], "multiple_of": 1}
        asked = {**recipe(), "steps": [{"prune": step}, *recipe()["steps"]]}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpointing, "_save", lambda *given: (_ for _ in ()).throw(Killed()))
        shrink_checkpoint(source, tmp_path / "out", asked, progress=False)
    text.write_text("Nobody on the shore can say how many stones there are. " * 40)
    with pytest.raises(CheckpointError, match=r"file \S*train.txt was"):
        shrink_checkpoint(source, tmp_path / "out", asked, progress=False)


def test_two_interruptions_around_the_last_renaming(source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The first between the journal's last entry and the renaming, the second while what was left is cleared away."""
    out = tmp_path / "out"
    shrink_checkpoint(source, out, recipe(), progress=False)

    def again() -> None:
        shrink_checkpoint(source, out, recipe(scheme="W8A16"), overwrite=True, progress=False)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(folder_module.OutputFolder, "put", lambda *given: (_ for _ in ()).throw(Killed()))
        again()
    real = shutil.rmtree

    def dies(path: Any, *given: Any, **named: Any) -> None:
        real(path, *given, **named)
        if Path(path).name == "output":
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(shutil, "rmtree", dies)
        again()
    again()
    assert bits(out) == {8}


def test_what_was_moved_aside_goes_when_the_result_is_there(source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    out, real = tmp_path / "out", os.replace
    shrink_checkpoint(source, out, recipe(), progress=False)

    def dies(old: Any, new: Any) -> None:
        if Path(new) == out:
            raise Killed
        real(old, new)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", dies)
        shrink_checkpoint(source, out, recipe(scheme="W8A16"), overwrite=True, progress=False)
    assert not out.exists()
    shrink_checkpoint(source, out, recipe(scheme="W8A16"), overwrite=True, progress=False)
    assert bits(out) == {8}
    assert sorted(os.listdir(tmp_path)) == ["models", "out"]


def test_the_journal_forgets_that_the_output_was_whole(tmp_path: Path) -> None:
    from hf_shrink.checkpoint.journal import WRITTEN, write_again, written

    journal = Journal.open(tmp_path, {"seed": 0})
    journal.add(blocks={"a": "b"}, **{WRITTEN: True})
    assert written(tmp_path)
    write_again(tmp_path)
    assert not written(tmp_path)
    assert Journal.open(tmp_path, {"seed": 0}).entries == {"blocks": {"a": "b"}}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is needed")
def test_a_disk_that_fills_up_is_named_and_what_is_finished_kept(
    source: Path, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / ".out.partial-run" / "finished" / "block-1.safetensors.partial"
    finished, done, full_at = JournalKeeper.finished, [], [1]

    def full(keeper: JournalKeeper, run: Any, stack: Any, place: int, **walks: Any) -> None:
        if place in full_at:
            full_at.remove(place)
            file.symlink_to("/dev/full")
        finished(keeper, run, stack, place, **walks)
        done.append(place)

    monkeypatch.setattr(JournalKeeper, "finished", full)
    arguments = ["run", str(source), "--output", str(tmp_path / "out"), "--quiet", "--effort", "fast"]
    arguments += ["--set", "quantize.group_size=16", "--evaluation", "none"]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert f"the disk is full ([Errno 28] No space left on device: '{file}')" in error
    assert "what is finished is kept, and a run goes on when it is started again" in error
    file.unlink()
    assert main(arguments) == 0
    assert done == [0, 1, 2, 3]
    assert bits(tmp_path / "out") == {4}
