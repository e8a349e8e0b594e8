"""Pushes that fail: before anything is sent, with one line that says what to do; or on the way, with nothing lost."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from hub.conftest import MEASURED, OWNER, READER, RUN, STRANGER, Screen
from hub.repositories import File, Repository
from hub.server import Fault, Server
from huggingface_hub import constants
from transformers import AutoModelForCausalLM

from hf_shrink import HubError, PushInterrupted
from hf_shrink.cli import main
from hf_shrink.hub import Destination

CHANGES = r"(POST .*/(create|commit|preupload|branch|discussions|batch).*|PUT .*)"


def outcome(arguments: list[str], screen: Screen) -> tuple[int, str]:
    """The exit code, and the one line that was said."""
    screen.read()
    code = main(arguments)
    _, err = screen.read()
    lines = [line for line in err.splitlines() if line.startswith("hf-shrink:")]
    assert len(lines) == 1, err
    return code, lines[0]


def _no_token(hub: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")


def _wrong_token(hub: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_unknown")


def _reader(hub: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", READER)


def _offline(hub: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def _theirs(hub: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    hub.hub.repositories["me/tiny"] = Repository("me/tiny", private=False)


def _taken(hub: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.hub.repositories["me/tiny"] = Repository("me/tiny", private=False)
    hub.hub.repositories["me/tiny"].commit("main", "a thesis", "", {"thesis.pdf": File(b"%PDF", False)})


@pytest.mark.parametrize(
    ("prepare", "arguments", "expected"),
    [
        (_no_token, ["me/tiny"], "hf auth login"),
        (_wrong_token, ["me/tiny"], "does not accept the token"),
        (_reader, ["me/tiny"], "may only read"),
        (_offline, ["me/tiny"], "HF_HUB_OFFLINE"),
        (_theirs, ["me/tiny"], "may not write to me/tiny"),
        (_taken, ["me/tiny"], "thesis.pdf"),
        (_taken, ["me/tiny", "--private"], "is public"),
        (None, ["them/tiny"], "may make one only for me, team"),
        (None, ["them/tiny", "--pr"], "to open a pull request for"),
        (None, ["me/tiny/x"], "OWNER/NAME"),
        (None, ["me/tiny", "--pr", "--revision", "w4"], "leave the revision out"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_sent(
    prepare: Callable[[Server, pytest.MonkeyPatch], None] | None,
    arguments: list[str],
    expected: str,
    hub: Server,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
    screen: Screen,
) -> None:
    if prepare is not None:
        prepare(hub, monkeypatch)
    code, said = outcome(["push", str(finished), *arguments, "--quiet"], screen)
    assert code == 2
    assert expected in said
    assert hub.count(CHANGES) == 0


def test_a_taken_name_can_be_overwritten_on_purpose(
    hub: Server, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _taken(hub, monkeypatch)
    assert main(["push", str(finished), "me/tiny", "--overwrite", "--quiet"]) == 0
    assert {"thesis.pdf", "shrink.json"} <= hub.hub.repositories["me/tiny"].files().keys()


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda folder: (folder / "shrink.json").unlink(), "no shrink.json"),
        (lambda folder: (folder / "README.md").unlink(), "hf-shrink report"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"12345678"), "cut short"),
        (lambda folder: (folder / "shrink.json").write_text("{}"), "not a record"),
        (lambda folder: (folder / "notes.txt").write_text(f"my token is {OWNER}"), "contains your token"),
        (lambda folder: (folder / "README.md").write_text("---\nbase_model_relation: cousin\n---\n"), "README.md"),
    ],
)
def test_a_folder_that_is_not_whole_is_not_pushed(
    spoil: Callable[[Path], object], expected: str, hub: Server, folder: Path, screen: Screen
) -> None:
    spoil(folder)
    code, said = outcome(["push", str(folder), "me/tiny", "--quiet"], screen)
    assert (code, expected in said) == (2, True), said
    assert all(len(repository.branches["main"]) == 1 for repository in hub.hub.repositories.values())


@pytest.mark.parametrize(
    "faults",
    [
        [Fault("POST /api/repos/create", 503), Fault("PUT", 500), Fault("POST .*/commit/", 502)],
        [Fault("PUT", after=1000), Fault("PUT", after=20_000, skip=1), Fault("POST .*/preupload/", after=10)],
        [Fault("POST .*/commit/", after=100), Fault("POST .*/batch", 429), Fault("POST .*/verify", 500)],
    ],
)
def test_errors_of_the_server_and_lost_connections_are_tried_again(
    faults: list[Fault], hub: Server, finished: Path
) -> None:
    hub.faults += faults
    assert main(["push", str(finished), "me/tiny", "--quiet"]) == 0
    assert not [fault for fault in faults if fault.times]
    repository = hub.hub.repositories["me/tiny"]
    assert repository.files()["model.safetensors"] == (finished / "model.safetensors").read_bytes()
    assert len(repository.branches["main"]) == 2


def test_a_push_that_broke_off_goes_on_where_it_was(hub: Server, folder: Path, screen: Screen) -> None:
    hub.faults.append(Fault("POST .*/commit/", 500, times=1000))
    code, said = outcome(["push", str(folder), "me/tiny", "--private", "--quiet"], screen)
    assert code == 1
    sent = hub.received("PUT")
    assert sent >= (folder / "model.safetensors").stat().st_size
    hub.faults.clear()
    again = said.split("go on with hf-shrink ")[1]
    assert main([*shlex.split(again), "--quiet"]) == 0
    assert hub.received("PUT") == sent  # nothing twice
    assert hub.hub.repositories["me/tiny"].private


def test_a_pull_request_that_broke_off_goes_on_in_itself(hub: Server, finished: Path, screen: Screen) -> None:
    theirs = hub.hub.repositories["them/model"] = Repository("them/model", private=False)
    hub.faults.append(Fault("POST .*/commit/", 500, times=1000))
    code, said = outcome(["push", str(finished), "them/model", "--pr", "--quiet"], screen)
    assert (code, theirs.pulls[1]["status"]) == (1, "draft")
    hub.faults.clear()
    assert main([*shlex.split(said.split("go on with hf-shrink ")[1]), "--quiet"]) == 0
    assert (list(theirs.pulls), theirs.pulls[1]["status"]) == ([1], "open")
    assert "shrink.json" in theirs.files("refs/pr/1")


def test_a_pull_request_that_was_never_opened_is_asked_for_again(hub: Server, finished: Path, screen: Screen) -> None:
    theirs = hub.hub.repositories["them/model"] = Repository("them/model", private=False)
    hub.faults.append(Fault("POST .*/discussions", 403))
    code, said = outcome(["push", str(finished), "them/model", "--pr", "--quiet"], screen)
    assert (code, theirs.pulls) == (2, {})
    assert main([*shlex.split(said.split("go on with hf-shrink ")[1]), "--quiet"]) == 0
    assert theirs.pulls[1]["status"] == "open" and "shrink.json" not in theirs.files()


def test_no_answer_at_all(hub: Server, finished: Path, screen: Screen) -> None:
    hub.faults.append(Fault("GET /api/whoami-v2", after=0))
    code, said = outcome(["push", str(finished), "me/tiny", "--quiet"], screen)
    assert code == 1
    assert "did not answer" in said


def test_signatures_of_storage_are_not_repeated(hub: Server, finished: Path, screen: Screen) -> None:
    hub.faults.append(Fault("PUT", 403, times=1000))
    code, said = outcome(["push", str(finished), "me/tiny", "--quiet"], screen)
    assert code == 2
    assert "X-Signature" not in said


def run(source: Path, output: Path) -> list[str]:
    return ["run", str(source), "--output", str(output), *RUN, *MEASURED, "--push-to-hub", "me/tiny"]


def test_run_asks_the_hub_before_it_computes(
    hub: Server, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, screen: Screen
) -> None:
    _taken(hub, monkeypatch)
    code, said = outcome(run(source, tmp_path / "out"), screen)
    assert (code, "thesis.pdf" in said) == (2, True)
    code, said = outcome([*run(source, tmp_path / "out")[:-2], "--private"], screen)
    assert (code, "--push-to-hub" in said) == (2, True)
    assert not (tmp_path / "out").exists()


def test_what_run_computed_is_kept_when_the_push_fails(
    hub: Server, source: Path, tmp_path: Path, screen: Screen
) -> None:
    output = tmp_path / "out"
    hub.faults.append(Fault("POST /api/repos/create", 403))  # what was allowed when it began
    code, said = outcome([*run(source, output), "--private"], screen)
    assert code == 1
    assert (output / "shrink.json").is_file()
    again = said.split(": hf-shrink ")[-1].rstrip(")")
    assert main([*shlex.split(again), "--quiet"]) == 0
    assert "shrink.json" in hub.hub.repositories["me/tiny"].files()
    assert hub.hub.repositories["me/tiny"].private


def test_a_model_that_cannot_be_pushed_is_on_the_disk(
    hub: Server, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(finished)
    with pytest.raises(HubError, match="may make one only"):
        model.push_to_hub("them/tiny")
    assert not list(tmp_path.glob("tiny-*"))  # asked before it was saved
    hub.faults.append(Fault("PUT", 500, times=1000))
    with pytest.raises(PushInterrupted) as failed:
        model.push_to_hub("me/tiny", token=OWNER)
    assert OWNER not in str(failed.value)
    (kept,) = tmp_path.glob("tiny-*")
    assert str(kept) in str(failed.value)
    assert json.loads((kept / "shrink.json").read_text())["plan"]


def test_a_push_that_is_stopped_says_how_it_goes_on(
    hub: Server, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, screen: Screen
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(finished)

    def stopped(*given: object, **named: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.HfApi.upload_folder", stopped)
        with pytest.raises(KeyboardInterrupt) as failed:
            model.push_to_hub("me/tiny", private=True)
        code, said = outcome(["push", str(finished), "me/tiny", "--quiet"], screen)
    assert (code, f"go on with hf-shrink push {finished}" in said) == (1, True)
    (kept,) = tmp_path.glob("tiny-*")
    again = shlex.split(str(failed.value).split("go on with hf-shrink ")[1])
    assert again[1] == str(kept)
    assert main([*again, "--quiet"]) == 0
    assert "shrink.json" in hub.hub.repositories["me/tiny"].files() and hub.hub.repositories["me/tiny"].private


def test_a_destination_does_not_show_its_token() -> None:
    assert OWNER not in repr(Destination("me/tiny", token=OWNER))
