"""`hf-shrink run` in two processes: one writes and speaks; when one dies all end, and what is finished stands."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from in_processes import join, said, start
from tiny import TEXT, tiny_llama, tiny_tokenizer

from hf_shrink.checkpoint.journal import Journal
from hf_shrink.cli import main
from hf_shrink.pipeline import checkpointing, recalled
from hf_shrink.pipeline.recalled import LOG, Recalled
from hf_shrink.residence import Residence

SMALL = ["--set=calibration.samples=12", "--set=calibration.length=24", "--set=calibration.batch_size=2"]
SMALL += ["--set=evaluation.metrics=[]", "--set=quantize.group_size=16", "--max-memory=0"]


@pytest.fixture(autouse=True)
def _without_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpointing, "write_report", lambda *given, **named: None)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes") / "source"
    tiny_llama(num_hidden_layers=3).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder.parent / "text.txt").write_text(TEXT * 3)
    return folder


def arguments(source: Path, out: Path) -> list[str]:
    return ["run", str(source), "--output", str(out), "--calibration", str(source.parent / "text.txt"), *SMALL]


def contents(folder: Path) -> dict[str, Any]:
    """What a run decides."""
    record = json.loads((folder / "shrink.json").read_text())
    report = {k: v for k, v in record["report"].items() if k != "seconds"}
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")} | {"report": report}


def both(source: Path, out: Path, log: Path) -> list[int]:
    return join(start(lambda rank: main(arguments(source, out)), log))


@pytest.fixture(scope="module")
def whole(source: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpointing, "write_report", lambda *given, **named: None)
        out = source.parent / "whole"
        assert both(source, out, source.parent / "log") == [0, 0], said(source.parent / "log", 0)
    return out


def test_one_writes_and_speaks(whole: Path) -> None:
    assert "model.safetensors" in {path.name for path in whole.iterdir()}
    assert sorted(path.name for path in whole.parent.iterdir()) == ["log", "source", "text.txt", "whole"]
    assert "compressing blocks: 3/3" in said(whole.parent / "log", 0)
    assert said(whole.parent / "log", 1) == ""


@pytest.mark.parametrize(
    ("how", "dies"),
    [
        (signal.SIGKILL, 1),
        pytest.param(signal.SIGTERM, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, 0, marks=pytest.mark.slow),
    ],
)
def test_when_one_dies_all_end_and_the_run_goes_on_later(
    how: signal.Signals, dies: int, source: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def work(rank: int) -> int:
        real, finished = (Residence.finish if rank == 0 else Residence.adopt), []

        def counting(*given: Any) -> None:
            finished.append(given[1])
            if rank == dies and len(finished) == 2:
                os.kill(os.getpid(), how)
            real(*given)

        setattr(Residence, real.__name__, counting)
        return main(arguments(source, out))

    codes = join(start(work, tmp_path / "log"))
    assert codes[1 - dies] == 1 and codes[dies] == (1 if how == signal.SIGTERM else -how)
    lines = [line for rank in range(2) for line in said(tmp_path / "log", rank).splitlines() if "hf-shrink:" in line]
    assert len(lines) == 1, lines
    expected = "ended by the launcher" if how == signal.SIGTERM else "another of the 2 processes ended"
    assert expected in lines[0] and "started again" in lines[0].replace("start the same command again", "started again")
    assert not out.exists()
    left = json.loads((tmp_path / ".out.partial-run" / "journal.json").read_text())
    assert list(left["entries"]["blocks"]) == ["model.layers.0"]
    assert both(source, out, tmp_path / "again") == [0, 0], said(tmp_path / "again", 0)
    assert contents(out) == contents(whole)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "log", "again"}


def test_as_many_go_on_as_began(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"

    def work(rank: int) -> int:
        real = Journal.add

        def dies(self: Journal, **entries: Any) -> None:
            real(self, **entries)
            if "blocks" in entries:
                os.kill(os.getpid(), signal.SIGKILL)

        Journal.add = dies  # type: ignore[method-assign]
        return main(arguments(source, out))

    assert join(start(work, tmp_path / "log")) == [-signal.SIGKILL] * 2
    assert main([*arguments(source, out), "--quiet"]) == 2
    assert re.search("processes was 2, is 1", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["run", "--set=quantize.method=gpqt"], "did you mean 'gptq'"),
        (["recover"], "give the baseline"),
    ],
)
def test_bad_input_is_said_once(asked: list[str], message: str, source: Path, tmp_path: Path) -> None:
    command = [asked[0], str(source), "--output", str(tmp_path / "out"), *asked[1:]]
    assert join(start(lambda rank: main(command), tmp_path / "log")) == [2, 2]
    text = said(tmp_path / "log", 0) + said(tmp_path / "log", 1)
    assert text.count("hf-shrink:") == 1 and message in text
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_what_shares_no_work_is_done_once(source: Path, tmp_path: Path) -> None:
    assert join(start(lambda rank: main(["recipes"]), tmp_path)) == [0, 0]
    assert "w4a16" in said(tmp_path, 0) and said(tmp_path, 1) == ""


@pytest.mark.slow
def test_planning_and_repair_go_on_later(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recalled, "EVERY", 0.0)
    recipe = tmp_path / "recipe.yaml"
    steps = [{"prune": {"what": "depth", "method": "kl_greedy", "blocks": 1}}]
    steps += [{"prune": {"what": "width", "method": "obs", "ratio": 0.2}}]
    recipe.write_text(json.dumps({"portable": False, "steps": steps}))
    small = [option for option in SMALL if "quantize" not in option]

    def asked(out: Path) -> list[str]:
        text = str(source.parent / "text.txt")
        return ["run", str(source), "--output", str(out), "--recipe", str(recipe), "--calibration", text, *small]

    def run(out: Path, lines: int | None, log: Path) -> list[int]:
        """Until the first process has written so many lines."""

        def work(rank: int) -> int:
            append, number = Recalled._append, [0]

            def counting(self: Recalled, entries: Any) -> Any:
                found = append(self, entries)
                number[0] += 1
                if number[0] == lines:
                    os.kill(os.getpid(), signal.SIGKILL)
                return found

            Recalled._append = counting  # type: ignore[method-assign]
            return main(asked(out))

        return join(start(work, log))

    assert run(tmp_path / "whole", None, tmp_path / "log") == [0, 0], said(tmp_path / "log", 0)
    for lines in (1, 3, 5):
        out = tmp_path / f"out-{lines}"
        assert run(out, lines, tmp_path / "log") == [-signal.SIGKILL, 1]
        left = (tmp_path / f".out-{lines}.partial-run" / "finished" / LOG).read_text()
        assert left.count("\n") == lines and not out.exists()
        assert run(out, None, tmp_path / "log") == [0, 0], said(tmp_path / "log", 0)
        assert contents(out) == contents(tmp_path / "whole")
