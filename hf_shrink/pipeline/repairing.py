"""After depth pruning: lead the pruned model's residual stream back to the dense one, block by block."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_shrink.architectures.absent import without_parts
from hf_shrink.architectures.binding import Binding
from hf_shrink.architectures.bound import BoundBlock, BoundStack
from hf_shrink.architectures.linears import matrix
from hf_shrink.calibration.capture import first_output
from hf_shrink.calibration.precision import in_float32
from hf_shrink.calibration.walk import StackWalk
from hf_shrink.ops.precision import fast_precision
from hf_shrink.pipeline.kept import KeptStack, remove_planned
from hf_shrink.plan import BlockPlan, Plan, StackPlan
from hf_shrink.progress import ProgressCallback
from hf_shrink.pruning.repair import Errors, best_change
from hf_shrink.report import ShrinkReport
from hf_shrink.residence import rest
from hf_shrink.sharding import ranks
from hf_shrink.surgery import check_plan, without_blocks

HELD_OUT = 8  # every so many sequences one is held out
TOLERANCE = 1e-3  # of the largest value, where a block's output is checked to be a sum


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

    The last matrix of a block that writes the residual stream is refitted by least squares, so that on the inputs that
    it gets in the pruned model it gives what the dense model has in front of the next block kept. Only where the
    block's output is its stream plus what that matrix gives, which is tried: blocks with norms behind it stay as they
    are. Notes and seconds go into the report. Raises as `check_plan` and `StackWalk`.
    """
    since = time.perf_counter()
    check_plan(binding, plan)
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
        self._gains: list[float] = []
        self._passed_over = 0

    def notes(self) -> list[str]:
        notes = []
        if self._gains:
            mean = sum(self._gains) / len(self._gains)
            notes.append(
                f"{len(self._gains)} matrices were refitted to the dense model's residual stream, which takes "
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
        kept = [stack.blocks[index] for index in plan.kept]
        with _without(self._model, stack, plan):
            pruned = _walk(self._model, kept, batches)
        held_out = _held_out(pruned)
        start = _first_change(stack, plan) or 0
        for place, block in enumerate(kept):
            following = plan.kept[place + 1] if place + 1 < len(kept) else len(stack.blocks)
            gap = [stack.blocks[index] for index in range(block.index + 1, following)]
            device = next(block.module.parameters()).device
            with _in_float32([block, *gap]):
                if place < start:
                    with fast_precision(device):
                        _together(dense, pruned)
                else:
                    with fast_precision(device):
                        for _ in range(1 + len(gap)):
                            dense.advance()
                    with _without_parts(stack, plan, [block.index]):
                        self._refit(block, plan.blocks.get(block.index, BlockPlan()), dense.hidden, pruned, held_out)
                        with fast_precision(device):  # anew: autocast keeps weights that it has cast until it ends
                            pruned.advance()
            for done in (block, *gap):
                rest(done.module)
            self._progress("repairing blocks", place + 1, len(kept))

    def _refit(
        self, block: BoundBlock, plan: BlockPlan, targets: Iterable[Tensor], walk: StackWalk, held_out: Sequence[Tensor]
    ) -> None:
        """Refit the block's last writing matrix; `walk` is in front of the block, whose removed parts are out."""
        writer = _writer(block, plan)
        if writer is None or not ranks().from_first(_adds(walk, writer)):
            self._passed_over += 1
            return
        weight = matrix(writer)
        bias = writer.bias if isinstance(writer.bias, nn.Parameter) else None
        errors = Errors.empty(weight.shape[0], weight.shape[1] + (bias is not None), weight.device)
        for batch, target in enumerate(targets):
            with fast_precision(weight.device):
                output, x = _run(walk, batch, writer)
            if bias is not None:
                x = torch.cat([x, x.new_ones(*x.shape[:-1], 1)], dim=-1)
            mask = walk.mask(batch)
            real = torch.ones(target.shape[:2], dtype=torch.bool, device=target.device) if mask is None else mask
            x = x.reshape(*target.shape[:2], -1)
            for held in (False, True):
                rows = real & (held_out[batch].to(real.device) == held)[:, None]
                errors.add(x[rows], (target - output)[rows], target[rows], held_out=held)
        errors.merge(walk.share)
        change, gain = best_change(errors)
        self._gains.append(gain)
        weight += change[:, : weight.shape[1]].to(weight.dtype)
        if bias is not None:
            bias.data += change[:, -1].to(bias.dtype)


def _together(dense: StackWalk, pruned: StackWalk) -> None:
    """Both through one block in front of every gap, where they are the same."""
    for batch in range(len(dense.hidden)):
        pruned.take(batch, dense.take(batch, dense.call(batch)))
    dense.step()
    pruned.step()


@contextmanager
def _in_float32(blocks: Sequence[BoundBlock]) -> Iterator[None]:
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(in_float32(block.module))
        yield


def _writer(block: BoundBlock, plan: BlockPlan) -> nn.Module | None:
    """The last matrix of what is left of a block that writes the residual stream."""
    gone = plan.removed or ()
    for name, role in (("mlp", "down"), ("cross_attention", "output"), ("attention", "output")):
        part = getattr(block, name)
        if part is not None and name not in gone:
            found: nn.Module = part.modules[part.slot(role).path]
            return found
    return None


def _run(walk: StackWalk, batch: int, writer: nn.Module) -> tuple[Tensor, Tensor]:
    """The current block's hidden states, and the writer's input."""
    seen: list[Tensor] = []
    handle = writer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        output = first_output(walk.call(batch))
    finally:
        handle.remove()
    return output, seen[-1]


def _adds(walk: StackWalk, writer: nn.Module) -> bool:
    """Whether the block's output is something plus what the writer puts out, tried on the first batch."""
    seen: list[Tensor] = []

    def silence(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        seen.append(output)
        return torch.zeros_like(output)

    whole = first_output(walk.call(0))
    handle = writer.register_forward_hook(silence)
    try:
        rest = first_output(walk.call(0))
    finally:
        handle.remove()
    if len(seen) != 1 or seen[0].numel() != rest.numel():
        return False
    summed = rest + seen[0].reshape(rest.shape)
    return bool((summed - whole).abs().max() <= TOLERANCE * whole.abs().max())


def _held_out(walk: StackWalk) -> list[Tensor]:
    """For every batch of this process, bool (sequences,): the last of every HELD_OUT sequences of all processes, and
    the last of all of fewer."""
    counts = walk.share.gather(len(hidden) for hidden in walk.hidden)
    total = sum(counts)
    numbers = torch.arange(total)
    held = numbers % HELD_OUT == HELD_OUT - 1 if total >= HELD_OUT else numbers == total - 1
    return walk.share.of(torch.split(held, counts))
