"""After depth pruning: lead the pruned model's residual stream back to the dense one, block by block."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_shrink.architectures.absent import without_parts
from hf_shrink.architectures.binding import Binding
from hf_shrink.architectures.bound import BoundBlock, BoundStack
from hf_shrink.calibration.precision import in_float32
from hf_shrink.calibration.walk import StackWalk
from hf_shrink.ops.precision import fast_precision
from hf_shrink.pipeline.kept import KeptStack, remove_planned
from hf_shrink.pipeline.leading import Stage, adds, lead, sums
from hf_shrink.pipeline.stretches import narrow, stretches, writers
from hf_shrink.plan import BlockPlan, Plan, StackPlan
from hf_shrink.progress import ProgressCallback
from hf_shrink.recall import Course, Done, recall
from hf_shrink.report import ShrinkReport
from hf_shrink.residence import at_work, rest
from hf_shrink.surgery import check_plan, without_blocks

HELD_OUT = 8  # every so many sequences one is held out


def repair_and_remove(
    model: nn.Module,
    binding: Binding,
    plan: Plan,
    batches: Sequence[Mapping[str, Any]],
    report: ShrinkReport,
    progress: ProgressCallback,
) -> list[KeptStack]:
    """As `remove_planned`; where the plan asks for it, with what is left repaired first."""
    if plan.repair and plan.prunes:
        repair(model, binding, plan, batches, report, progress)
    return remove_planned(model, binding, plan)


def repair(
    model: nn.Module,
    binding: Binding,
    plan: Plan,
    batches: Sequence[Mapping[str, Any]],
    report: ShrinkReport,
    progress: ProgressCallback,
) -> None:
    """Refit the blocks that the plan keeps, in place, from the first gap on; the gaps themselves are cut afterwards.

    Matrices that write the residual stream are refitted by least squares, so that on the inputs that they get in the
    pruned model the stream is that of the dense model in front of the next block kept: of the blocks in front of a gap
    all such matrices together, of each block behind it the last. Only where a block's output is its stream plus what
    they give, which is tried: blocks with norms behind them stay as they are. Notes and seconds go into the report.
    Raises as `check_plan` and `StackWalk`.
    """
    since = time.perf_counter()
    check_plan(model, plan)
    job = _Repair(model, progress)
    whole = {s.name: StackPlan(tuple(range(len(s.blocks)))) for s in binding.stacks}
    plans = {stack.name: plan.stacks.get(stack.name, whole[stack.name]) for stack in binding.stacks}
    changed = [s for s in binding.stacks if _first_change(s, plans[s.name]) is not None]
    # The dense model's inputs of all stacks are taken before any stack changes.
    walks = {stack.name: _walk(model, stack.blocks, batches) for stack in changed}
    with ExitStack() as gone:
        for stack in binding.stacks:
            if stack in changed:
                job.stack(stack, plans[stack.name], walks.pop(stack.name), batches)
            gone.enter_context(_without(model, stack, plans[stack.name]))
    report.notes += job.notes()
    report.seconds["repair"] = time.perf_counter() - since


def _first_change(stack: BoundStack, plan: StackPlan) -> int | None:
    """The place among the kept blocks of the first that has something to make up for; None where nothing is gone."""
    removed = sorted(set(range(len(stack.blocks))) - set(plan.kept))
    starts = [max(sum(index < gap for index in plan.kept) - 1, 0) for gap in removed[:1]]
    starts += [place for place, index in enumerate(plan.kept) if plan.blocks.get(index, BlockPlan()).removed]
    return min(starts, default=None)


def _walk(model: nn.Module, blocks: Sequence[BoundBlock], batches: Sequence[Mapping[str, Any]]) -> StackWalk:
    return StackWalk(model, [block.module for block in blocks], batches, starved_experts="rtn")


@contextmanager
def _without(model: nn.Module, stack: BoundStack, plan: StackPlan) -> Iterator[None]:
    removed = sorted(set(range(len(stack.blocks))) - set(plan.kept))
    with without_blocks(model, stack, removed) if removed else ExitStack(), _without_parts(stack, plan, plan.kept):
        yield


def _without_parts(stack: BoundStack, plan: StackPlan, indices: Sequence[int]) -> AbstractContextManager[None]:
    own = [(index, plan.blocks[index].removed) for index in indices if index in plan.blocks]
    assert stack.spec is not None or not own
    return without_parts([(stack.blocks[i].module, stack.spec, parts) for i, parts in own if stack.spec and parts])


class _Repair:
    """Counts what was done, over the stacks."""

    def __init__(self, model: nn.Module, progress: ProgressCallback) -> None:
        self._model = model
        self._progress = progress
        self._refitted = 0
        self._gains: list[float] = []
        self._passed_over = 0

    def notes(self) -> list[str]:
        notes = []
        if self._gains:
            mean = sum(self._gains) / len(self._gains)
            notes.append(
                f"{self._refitted} matrices were refitted to the dense model's residual stream, which takes "
                f"{mean:.0%} of its error on held-out tokens away on average"
            )
        if self._passed_over:
            notes.append(
                f"{self._passed_over} blocks were not refitted after depth pruning: what they write passes through a "
                "norm, or through a mixture of experts, before it reaches the residual stream"
            )
        return notes

    def stack(self, stack: BoundStack, plan: StackPlan, dense: StackWalk, batches: Sequence[Mapping[str, Any]]) -> None:
        """Walk the dense and the pruned stack side by side."""
        with _without(self._model, stack, plan):
            pruned = _walk(self._model, [stack.blocks[index] for index in plan.kept], batches)
        side = _SideBySide(stack, plan, dense, pruned, recall().course(f"repairing {stack.name}"))
        front = stack.blocks[: plan.kept[0]]
        side.pass_by(front)
        touched, done = bool(front), 0
        for stretch in stretches(stack, plan):
            team = stretch.team(plan)
            self._each(side, stretch.blocks[: len(stretch.blocks) - len(team)], touched)
            if team:
                alone = side.unfit(team)
                self._each(side, team[:alone], touched)
                self._count(*side.lead(team[alone:], stretch.gap))
                touched = True
            done += len(stretch.blocks)
            self._progress("repairing blocks", done, len(plan.kept))

    def _each(self, side: _SideBySide, blocks: Sequence[BoundBlock], touched: bool) -> None:
        """In front of every gap nothing has to be done; behind one, each block is led to the dense stream behind it."""
        for block in blocks:
            if touched:
                self._count(*side.lead([block]))
            else:
                side.together(block)

    def _count(self, refitted: int, gain: float) -> None:
        if refitted:
            self._refitted += refitted
            self._gains.append(gain)
        else:
            self._passed_over += 1


class _SideBySide:
    """The dense and the pruned walk of one stack, in front of the same block. They share its modules.

    `course`: remembers what is done here, step by step.
    """

    def __init__(self, stack: BoundStack, plan: StackPlan, dense: StackWalk, pruned: StackWalk, course: Course) -> None:
        self._stack, self._plan, self._course = stack, plan, course
        self._dense, self._pruned = dense, pruned
        self._held_out = _held_out(pruned)
        # Not a block's own: one that visits an accelerator is there only while it runs.
        self._device = pruned.hidden[0].device if len(pruned.hidden) else torch.device("cpu")

    def _step(self, do: Callable[[], Done], blocks: Sequence[BoundBlock] = ()) -> Mapping[str, Any]:
        """One step; `blocks`: those that it may change."""
        modules = {f"{self._stack.path}.{block.index}": block.module for block in blocks}
        return self._course.step(do, modules=modules, walks={"dense": self._dense, "pruned": self._pruned}).said

    def pass_by(self, blocks: Sequence[BoundBlock]) -> None:
        """Removed blocks in front, through which the dense model alone goes."""
        if blocks:
            self._step(lambda: self._pass_by(blocks))

    def _pass_by(self, blocks: Sequence[BoundBlock]) -> Done:
        for block in blocks:
            with in_float32(block.module), fast_precision(self._device):
                self._dense.advance()
            rest(block.module)
        return Done()

    def together(self, block: BoundBlock) -> None:
        """Through a block in front of every gap, where both are the same."""
        self._step(lambda: self._together(block))

    def _together(self, block: BoundBlock) -> Done:
        with in_float32(block.module), fast_precision(self._device):
            for batch in range(len(self._dense.hidden)):
                self._pruned.take(batch, self._dense.take(batch, self._dense.call(batch)))
            self._dense.step()
            self._pruned.step()
        rest(block.module)
        return Done()

    def unfit(self, team: Sequence[BoundBlock]) -> int:
        """How many of a team's first blocks are to be led alone, because theirs or a later output is no sum."""
        return 0 if len(team) == 1 else int(self._step(lambda: self._unfit(team))["unfit"])

    def _unfit(self, team: Sequence[BoundBlock]) -> Done:
        with self._ready(team):
            fits = sums(self._pruned, [block.module for block in team], [writers(b, self._plan) for b in team])
        last = max((place + 1 for place, fit in enumerate(fits) if not fit), default=0)
        return Done({"unfit": last if fits[-1] else len(team) - 1})

    def lead(self, blocks: Sequence[BoundBlock], gap: Sequence[BoundBlock] | None = None) -> tuple[int, float]:
        """Refit blocks in a row so that the stream behind them is the dense one behind the gap.

        Args:
            gap: None: this is one block behind which nothing is missing, of which the last matrix is enough.

        Returns:
            How many matrices were refitted, and the share of the error that is gone.
        """
        said = self._step(lambda: self._lead(blocks, gap), blocks)
        return int(said["refitted"]), float(said["gain"])

    def _lead(self, blocks: Sequence[BoundBlock], gap: Sequence[BoundBlock] | None) -> Done:
        for block in blocks:
            with in_float32(block.module), fast_precision(self._device):
                self._dense.advance()
        self._pass_by(gap or ())
        with self._ready(blocks):
            stages = self._stages(blocks, last=gap is None)
            gain = lead(self._pruned, len(blocks), stages, self._dense.hidden, self._held_out)
        for block in blocks:
            rest(block.module)
        return Done({"refitted": len(stages), "gain": gain})

    def _stages(self, blocks: Sequence[BoundBlock], last: bool) -> list[Stage]:
        """What is refitted of blocks that the pruned walk is in front of."""
        found = [(place, writer) for place, block in enumerate(blocks) for writer in writers(block, self._plan)]
        if len(blocks) > 1 or not found:
            return found
        own = [writer for _, writer in found]
        if not last and narrow(blocks, self._plan) and sums(self._pruned, [blocks[0].module], [own])[0]:
            return found
        return found[-1:] if adds(self._pruned, found[-1][1]) else []

    @contextmanager
    def _ready(self, blocks: Sequence[BoundBlock]) -> Iterator[None]:
        """Blocks as the pruned model has them, in float32, where they run."""
        with ExitStack() as stack:
            for block in blocks:
                stack.enter_context(at_work(block.module))
                stack.enter_context(in_float32(block.module))
            stack.enter_context(_without_parts(self._stack, self._plan, [block.index for block in blocks]))
            yield


def _held_out(walk: StackWalk) -> list[Tensor]:
    """For every batch of this process, bool (sequences,): the last of every HELD_OUT sequences of all processes, and
    the last of all of fewer."""
    counts = walk.share.gather(len(hidden) for hidden in walk.hidden)
    total = sum(counts)
    numbers = torch.arange(total)
    held = numbers % HELD_OUT == HELD_OUT - 1 if total >= HELD_OUT else numbers == total - 1
    return walk.share.of(torch.split(held, counts))
