"""A run that is killed while it plans or repairs goes on there: nothing is done twice, and the same comes out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.cases_mixtures import MIXTURES, data
from tiny import tiny_llama, tiny_tokenizer
from torch import nn
from transformers import PreTrainedModel

from hf_shrink import shrink_checkpoint
from hf_shrink.calibration.walk import StackWalk
from hf_shrink.pipeline import checkpointing, recalled
from hf_shrink.pipeline.recalled import LOG, Recalled
from hf_shrink.recall import Done, recall, recalling


class Killed(BaseException):
    """Nothing catches it."""


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step is written down, and no report page is drawn."""
    monkeypatch.setattr(recalled, "EVERY", 0.0)
    monkeypatch.setattr(checkpointing, "write_report", lambda *given, **named: None)


def batches() -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, 300, (2, 24), generator=draw)} for _ in range(6)]


def llama() -> PreTrainedModel:
    return tiny_llama(num_hidden_layers=6)


def pruned(**step: Any) -> dict[str, Any]:
    return {"portable": False, "steps": [{"prune": step}], "evaluation": {"metrics": []}}


Case = tuple[Callable[[], PreTrainedModel], dict[str, Any], Callable[[], Any]]
CASES: dict[str, Case] = {
    "depth": (llama, pruned(what="depth", method="kl_greedy", blocks=2), batches),
    "evolve": (llama, pruned(what="depth", method="evolve", blocks=2, generations=4), batches),
    "span": (llama, pruned(what="depth", method="span", blocks=2), batches),
    "width": (llama, pruned(what="width", method="obs", ratio=0.2), batches),
    "gradients": (llama, pruned(what="width", method="taylor", ratio=0.2), batches),
    "experts": (MIXTURES["mixtral"], pruned(what="experts", method="reap", experts=1), data),
    "budget": (
        llama,
        {"budget": {"bytes": "40%"}, "search": {"generations": 2}, "evaluation": {"metrics": []}},
        batches,
    ),
}
QUICK = ("depth",)
every_case = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in CASES]
)


def contents(folder: Path) -> dict[str, Any]:
    record = json.loads((folder / "shrink.json").read_text())
    files = {f.name: f.read_bytes() for f in folder.iterdir() if f.suffix == ".safetensors" or f.name == "config.json"}
    return {**files, "plan": {**record["plan"], "search": None}, "notes": len(record["report"]["notes"])}


@contextmanager
def killed_at(line: int, written: bool) -> Iterator[Counter[str]]:
    """Die at a line of the log, before or after it is written; counts what was written before."""
    seen: Counter[str] = Counter()
    append, number = Recalled._append, [0]

    def dying(self: Recalled, entries: Mapping[str, Any]) -> dict[str, Any]:
        number[0] += 1
        if number[0] == line and not written:
            raise Killed
        found = append(self, entries)
        seen.update(entries.keys())
        if number[0] == line:
            raise Killed
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recalled, "_append", dying)
        yield seen


@every_case
def test_it_goes_on_where_it_was_cut_off(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_SHRINK_CACHE", str(tmp_path / "cache"))
    build, recipe, given = CASES[name]
    source = tmp_path / "source"
    build().save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    arguments: dict[str, Any] = {"calibration": given(), "max_memory": 0, "progress": False}
    with killed_at(0, written=False) as whole:
        shrink_checkpoint(source, tmp_path / "out", recipe, **arguments)
    expected, lines = contents(tmp_path / "out"), len(whole)
    assert lines >= {"gradients": 1, "experts": 2}.get(name, 3)
    for line, written in sorted({(1, True), (max(1, lines // 2), False), (max(1, lines - 1), True)}):
        again = tmp_path / f"again-{line}-{written}"
        monkeypatch.setenv("HF_SHRINK_CACHE", str(tmp_path / f"cache-{line}-{written}"))
        with killed_at(line, written) as first, pytest.raises(Killed):
            shrink_checkpoint(source, again, recipe, **arguments)
        assert not again.exists() and first.total() <= line
        with killed_at(0, written=False) as rest:
            shrink_checkpoint(source, again, recipe, **arguments)
        assert contents(again) == expected
        # Every entry once, by the one or the other.
        assert first + rest == whole
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_line_that_was_not_written_to_its_end_is_no_line(tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> list[int]:
        made.append(len(made))
        return [len(made)]

    for _ in range(2):
        with recalling(Recalled(tmp_path)):
            assert recall().value("some", (1, 2), make) == [1]
    with recalling(Recalled(tmp_path)):
        assert recall().value("some", (1, 3), make) == [2]
    text = (tmp_path / LOG).read_text()
    (tmp_path / LOG).write_text(text[:-4])
    with recalling(Recalled(tmp_path)):
        assert recall().value("some", (1, 3), make) == [3]
        assert recall().value("other", (1, 3), make) == [4]
    with recalling(Recalled(tmp_path)):
        assert [recall().value("some", key, make) for key in ((1, 2), (1, 3))] == [[1], [3]]
    assert len(made) == 4
    assert recall().value("some", (1, 2), make) == [5]  # nobody remembers outside


def test_steps_wait_until_enough_would_be_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recalled, "EVERY", 1e9)
    model = tiny_llama()
    blocks: list[nn.Module] = list(model.model.layers)

    def walk_on(walk: StackWalk) -> Done:
        walk.advance()
        return Done({"position": walk.position}, {"first": walk.hidden[0].clone()})

    whole = StackWalk(model, blocks, batches())
    for _ in blocks:
        whole.advance()
    for number, every in enumerate((1e9, 0.0, 1e9)):
        monkeypatch.setattr(recalled, "EVERY", every)
        walk = StackWalk(model, blocks, batches())
        with recalling(Recalled(tmp_path)):
            course = recall().course("walking")
            for place in range(len(blocks)):
                found = course.step(lambda walk=walk: walk_on(walk), walks={"walk": walk})
                assert found.said["position"] == place + 1
        assert torch.equal(found.tensors["first"], whole.hidden[0])
        assert walk.position == (0 if number == 2 else len(blocks))  # in the end all steps are known
    assert (tmp_path / LOG).read_text().count("\n") == len(blocks)
    assert len([path for path in tmp_path.iterdir() if path.name.endswith("-walk.safetensors")]) == 1
