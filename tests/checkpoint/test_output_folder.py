"""The output folder is whole or not there; what was there before survives every failure."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import tiny_llama, tiny_tokenizer

from hf_shrink.checkpoint import folder as folder_module
from hf_shrink.checkpoint.fingerprint import fingerprint
from hf_shrink.checkpoint.folder import OutputFolder
from hf_shrink.checkpoint.side_files import copy_side_files
from hf_shrink.checkpoint.source import Source, load_processing, open_source
from hf_shrink.errors import CheckpointError


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def write(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    (folder / "plots").mkdir()
    (folder / "plots" / "a.png").write_text(text)


@pytest.mark.parametrize("exists", [False, True])
def test_it_appears_when_it_is_whole(exists: bool, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    if exists:
        target.mkdir(parents=True)
    with OutputFolder(target) as folder:
        assert folder.parent == target.parent
        write(folder, "new")
        assert not target.exists() or not list(target.iterdir())
    assert contents(target) == {"config.json": "new", "plots/a.png": "new"}
    assert os.listdir(target.parent) == ["out"]
    assert target.stat().st_mode & 0o777 == 0o777 & ~folder_module._umask()


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), OutputFolder(tmp_path / "out") as folder:
        write(folder, "half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_what_is_there_is_not_touched(tmp_path: Path) -> None:
    write(tmp_path, "old")
    with pytest.raises(CheckpointError, match="not empty"), OutputFolder(tmp_path):
        pass
    assert contents(tmp_path) == {"config.json": "old", "plots/a.png": "old"}


def test_overwriting_replaces_all_of_it(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    write(target, "old")
    (target / "left-over.safetensors").write_text("old")
    with OutputFolder(target, overwrite=True) as folder:
        write(folder, "new")
        assert contents(target)["config.json"] == "old"
    assert contents(target) == {"config.json": "new", "plots/a.png": "new"}
    assert os.listdir(tmp_path) == ["out"]


def test_a_failed_overwrite_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    write(target, "old")
    with pytest.raises(ValueError, match="boom"), OutputFolder(target, overwrite=True) as folder:
        write(folder, "half")
        raise ValueError("boom")
    assert contents(target)["config.json"] == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_a_rename_that_fails_puts_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    target.mkdir()
    write(target, "old")
    replace = os.replace

    def failing(source: Path, place: Path) -> None:
        if ".partial-" in str(source):
            raise OSError("disk full")
        replace(source, place)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="disk full"), OutputFolder(target, overwrite=True) as folder:
        write(folder, "new")
    assert contents(target) == {"config.json": "old", "plots/a.png": "old"}
    assert os.listdir(tmp_path) == ["out"]


def test_something_that_is_no_model_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="not a model"), OutputFolder(tmp_path, overwrite=True):
        pass
    assert contents(tmp_path) == {"thesis.txt": "years of work"}


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match="is a file"), OutputFolder(tmp_path / "out", overwrite):
            pass
    with pytest.raises(CheckpointError, match="cannot write"), OutputFolder(tmp_path / "out" / "inner"):
        pass


def test_a_target_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(CheckpointError, match="not empty"), OutputFolder(target) as folder:
        write(folder, "new")
        target.mkdir()
        write(target, "someone else's")
    assert contents(target)["config.json"] == "someone else's"
    assert os.listdir(tmp_path) == ["out"]


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with OutputFolder(tmp_path / "link") as folder:
        write(folder, "new")
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "real")["config.json"] == "new"


def test_side_files_come_along(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    out.mkdir()
    tiny_llama().save_pretrained(source)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(source)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "README.md").write_text("The old card.")
    (source / "optimizer.pt").write_text("not wanted")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("tool")

    assert copy_side_files(open_source(source), out) == "The old card."
    assert set(contents(out)) == {
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
        "additional_chat_templates/tool.jinja",
    }
    for name, text in contents(out).items():
        assert (source / name).read_text() == text
    tiny_llama().save_pretrained(out)
    assert load_processing(open_source(out)).get_vocab() == tokenizer.get_vocab()
    assert json.loads((out / "generation_config.json").read_text())


def test_what_embeddings_and_rare_tokenizers_need_comes_along(tmp_path: Path) -> None:
    """Pooling that is lost would be replaced by another one, without an error."""
    source, out = tmp_path / "source", tmp_path / "out"
    out.mkdir()
    tiny_llama().save_pretrained(source)
    kept = ("tekken.json", "spm.model", "source.spm", "bpe.codes", "sentence_bert_config.json", "1_Pooling/config.json")
    for name in (*kept, "2_Dense/model.safetensors", "2_Dense/notes.txt", "0_Transformer/config.json"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(name)
    modules = [(".", "models.Transformer"), ("1_Pooling", "models.Pooling"), ("2_Dense", "models.Dense")]
    modules += [("0_Transformer", "models.Transformer"), ("../elsewhere", "models.Normalize")]
    (source / "modules.json").write_text(json.dumps([{"path": path, "type": kind} for path, kind in modules]))
    copy_side_files(open_source(source), out)
    copied = {name for name, text in contents(out).items() if name == text}
    assert copied == {*kept, "2_Dense/model.safetensors"}
    assert "modules.json" in contents(out)
    assert {*kept, "2_Dense/model.safetensors"} <= set(fingerprint(open_source(source)))
    (source / "modules.json").write_text("{}]")
    with pytest.raises(CheckpointError, match="modules"):
        copy_side_files(open_source(source), out)


def test_of_a_hub_id_all_that_will_be_copied_counts_from_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was not fetched yet is, so that a run that goes on knows its source again."""
    snapshot = tmp_path / "snapshot"
    tiny_llama().save_pretrained(snapshot)
    source = replace(open_source(snapshot), shards=())

    def fetched(_: Source, name: str) -> Path | None:
        if name == "vocab.json":
            (snapshot / name).write_text("{}")
        return snapshot / name if (snapshot / name).is_file() else None

    monkeypatch.setattr("hf_shrink.checkpoint.side_files.side_file", fetched)
    first = fingerprint(source)
    assert "vocab.json" in first
    assert fingerprint(source) == first


def test_a_source_without_a_card(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "source")
    (tmp_path / "out").mkdir()
    assert copy_side_files(open_source(tmp_path / "source"), tmp_path / "out") is None


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_mount_point_is_refused_before_the_work(
    overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No folder can be renamed into its place."""
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path)
    with pytest.raises(CheckpointError, match=r"mount point.*inside it"), OutputFolder(tmp_path, overwrite):
        pass
    with OutputFolder(tmp_path / "model", overwrite) as folder:
        write(folder, "new")
    assert contents(tmp_path / "model")["config.json"] == "new"
