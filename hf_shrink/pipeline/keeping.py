"""What a run writes down on its way, and how another process goes on from there.

A block that is finished lies in a file of its own; beside it lie the hidden states behind it, of the compressed and of
the dense model. Everything else that a run has decided or counted is in the journal. Of what comes before the first
block the plan is there; passes that make it, or repair what depth pruning leaves, are in `recalled.py`. The rest (what
is folded into weights, the residual stream's rotation) is done again: it is the same.

Of several processes the first one writes the journal and the blocks, which the others then read from there as well, so
that all hold the same bits; each writes the hidden states of its own batches. To go on there must be as many as before.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_shrink.calibration.batches import CalibrationData
from hf_shrink.calibration.walk import StackWalk
from hf_shrink.calibration.walk_state import read_walk, write_walk
from hf_shrink.checkpoint.journal import Journal
from hf_shrink.errors import CheckpointError
from hf_shrink.pipeline.estimating import estimate, tokens_of
from hf_shrink.pipeline.kept import KeptStack
from hf_shrink.pipeline.restoring import rebuild
from hf_shrink.plan import Plan
from hf_shrink.quantization.base import Learnt
from hf_shrink.residence import map_tensors, residence_of, rest, write_tensors
from hf_shrink.sharding import ranks

if TYPE_CHECKING:
    from hf_shrink.pipeline.planning import Planned
    from hf_shrink.pipeline.running import Run


class Keeper:
    """Writes nothing down: a model in memory, or in files that are of no use to another process."""

    elapsed = 0.0  # seconds that earlier processes spent on the run

    def data(self, name: str, make: Callable[[], CalibrationData], *, named: bool) -> CalibrationData:
        """The batches that `make` makes. `named`: they are known by their name, and need not be made again."""
        return make()

    def foresee(self, model: nn.Module, plan: Plan | None) -> None:
        """The run is about to start; `plan` is what is known of its plan, None where that is nothing."""

    def planned(self, make: Callable[[], Planned]) -> Planned:
        """The plan that `make` makes."""
        return make()

    def begin(self, model: nn.Module, plan: Plan, batches: Sequence[Mapping[str, Any]]) -> None:
        """The plan is about to be carried out."""

    def restore(self, run: Run, stack: KeptStack) -> int:
        """How many of a stack's blocks are finished; they are put into the model, and `run` is as it was then."""
        return 0

    def resume(self, stack: KeptStack, **walks: StackWalk | None) -> None:
        """Bring walks to where they were when the last finished block was left."""

    def finished(self, run: Run, stack: KeptStack, place: int, **walks: StackWalk | None) -> None:
        """A block, the stack's at `place`, is finished. All processes end with the same bits of it."""
        block = stack.stack.blocks[place].module
        ranks().copy_first(*block.parameters(), *block.buffers())
        rest(block)


NOTHING_KEPT = Keeper()


@dataclass
class JournalKeeper(Keeper):
    """Writes everything down.

    Attributes:
        journal: what is finished.
        folder: where its files lie.
        clock: seconds of this process so far.
        max_memory: bytes that activations may take.
        note: says one line to the user.
    """

    journal: Journal
    folder: Path
    clock: Callable[[], float]
    max_memory: int
    note: Callable[[str], None] = lambda line: None

    def __post_init__(self) -> None:
        self.elapsed = float(self.journal.get("elapsed") or 0.0)

    def data(self, name: str, make: Callable[[], CalibrationData], *, named: bool) -> CalibrationData:
        known = self.journal.get(name)
        if known is not None and named and known["file"] is not None:
            return _read_batches(self.folder / known["file"], known)
        data = make()
        digest, storable = _digest(data), all(isinstance(v, Tensor) for b in data.batches for v in b.values())
        if known is not None and known["digest"] != digest:
            raise CheckpointError(
                f"the {name} data is not that of the run that was interrupted; pass the same to go on, or start anew "
                "with --no-resume (resume=False)"
            )
        file = f"{name}.safetensors" if named and storable and data.batches else None
        if file is not None:
            flat = {f"{i}.{key}": v.contiguous() for i, batch in enumerate(data.batches) for key, v in batch.items()}
            ranks().on_first(lambda: write_tensors(self.folder / file, flat))
        entry: dict[str, Any] = {"file": file, "digest": digest, "description": data.description}
        entry |= {"details": data.details, "tokens": data.tokens, "batches": [[*batch] for batch in data.batches]}
        self.journal.add(**{name: entry})
        return data

    def foresee(self, model: nn.Module, plan: Plan | None) -> None:
        if plan is not None and self.journal.get("plan") is None:  # else `begin` knows better
            needs = estimate(model, plan, 0, self.max_memory)
            ranks().on_first(lambda: needs.check_disk(self.folder))

    def planned(self, make: Callable[[], Planned]) -> Planned:
        from hf_shrink.pipeline.planning import Planned

        known = self.journal.get("plan")
        if known is not None:
            return Planned(Plan.from_json(known["plan"]), tuple(known["notes"]))
        planned = make()
        self.journal.add(
            plan={"plan": json.loads(planned.plan.to_json()), "notes": list(planned.notes)}, elapsed=self._now()
        )
        return planned

    def begin(self, model: nn.Module, plan: Plan, batches: Sequence[Mapping[str, Any]]) -> None:
        if not self.journal.get("blocks"):
            needs = estimate(model, plan, sum(map(tokens_of, batches)), self.max_memory)
            ranks().on_first(lambda: needs.check_disk(self.folder))
            self.note(needs.summary())

    def restore(self, run: Run, stack: KeptStack) -> int:
        files = self.journal.get("blocks") or {}
        names = _names(stack)
        done = next((place for place, name in enumerate(names) if name not in files), len(names))
        for place in range(done):
            rebuild(run, stack, place)
            _residence(run).adopt(names[place], stack.stack.blocks[place].module, self.folder / files[names[place]])
            rest(stack.stack.blocks[place].module)
        if done:
            _put_state(run, self.journal.get("state"))
        return done

    def resume(self, stack: KeptStack, **walks: StackWalk | None) -> None:
        known = self.journal.get("walks") or {}
        for name, walk in walks.items():
            entry = known.get(name)
            if walk is not None and entry is not None and entry["stack"] == stack.stack.path:
                read_walk(walk, self._own(entry["file"]), entry["position"], entry["starved"])

    def finished(self, run: Run, stack: KeptStack, place: int, **walks: StackWalk | None) -> None:
        block, name = stack.stack.blocks[place], _names(stack)[place]
        file = f"block-{len(self.journal.get('blocks') or {})}.safetensors"
        ranks().on_first(lambda: _residence(run).finish(name, block.module, self.folder / file))
        if not ranks().first:
            _residence(run).adopt(name, block.module, self.folder / file)
        rest(block.module)
        before = {entry["file"] for entry in (self.journal.get("walks") or {}).values()}
        after = {}
        for kind, walk in walks.items():
            if walk is not None and walk.position == place + 1:
                states = f"{kind}-{file}"
                write_walk(walk, self._own(states))
                after[kind] = {
                    "stack": stack.stack.path,
                    "position": walk.position,
                    "starved": walk.starved,
                    "file": states,
                }
        blocks = {**(self.journal.get("blocks") or {}), name: file}
        ranks().wait()  # for everybody's hidden states
        self.journal.add(blocks=blocks, walks=after, state=_state(run), elapsed=self._now())
        for old in before:
            self._own(old).unlink(missing_ok=True)

    def _own(self, file: str) -> Path:
        """Where this process has what each has for itself."""
        return self.folder / f"{ranks().rank}-{file}"

    def _now(self) -> float:
        return self.elapsed + self.clock()


def _names(stack: KeptStack) -> list[str]:
    """Of the stack's blocks, as they are called in the source."""
    return [f"{stack.stack.path}.{source}" for source in stack.kept]


def _residence(run: Run) -> Any:
    residence = residence_of(run.model)
    assert residence is not None
    return residence


def _state(run: Run) -> dict[str, Any]:
    """What a run has counted so far, as JSON values."""
    masking, learning = run.masking, run.learning
    return {
        "report": run.report.to_dict(),
        "done": run.done,
        "scaled": run.scaler.scaled,
        "refused": [[*key, count] for key, count in run.scaler.refused.items()],
        "masking": masking and {n: getattr(masking, n) for n in ("zeroed", "notes", "sparsities", "without_data")},
        "learning": learning and {"seconds": learning.seconds, "gains": [asdict(gain) for gain in learning.gains]},
    }


def _put_state(run: Run, state: dict[str, Any]) -> None:
    for name, value in state["report"].items():
        held = getattr(run.report, name)
        if isinstance(held, dict):  # others hold these
            held.clear()
            held.update(value)
        elif isinstance(held, list):
            held[:] = value
        else:
            setattr(run.report, name, value)
    run.done, run.scaler.scaled = state["done"], state["scaled"]
    run.scaler.refused = Counter({(roles, reason): count for roles, reason, count in state["refused"]})
    for name, value in (state["masking"] or {}).items():
        setattr(run.masking, name, value)
    if run.learning is not None and state["learning"] is not None:
        run.learning.seconds = state["learning"]["seconds"]
        run.learning.gains = [Learnt(**gain) for gain in state["learning"]["gains"]]


def _digest(data: CalibrationData) -> str:
    """Of all that a model gets to see."""
    found = hashlib.sha256()
    for batch in data.batches:
        for key, value in sorted(batch.items()):
            found.update(key.encode())
            if isinstance(value, Tensor):
                found.update(f"{value.dtype}{tuple(value.shape)}".encode())
                found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            else:
                found.update(repr(value).encode())
    return found.hexdigest()


def _read_batches(path: Path, entry: dict[str, Any]) -> CalibrationData:
    tensors = map_tensors(path)
    batches = [{key: tensors[f"{i}.{key}"].clone() for key in keys} for i, keys in enumerate(entry["batches"])]
    return CalibrationData(batches, entry["description"], entry["details"], entry["tokens"])
