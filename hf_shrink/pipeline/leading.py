"""Lead a pruned stack's residual stream to a target: refit what a few blocks in a row add to it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_shrink.architectures.linears import matrix
from hf_shrink.calibration.ahead import ahead
from hf_shrink.calibration.capture import first_output, split_hidden
from hf_shrink.calibration.walk import StackWalk
from hf_shrink.ops.precision import fast_precision
from hf_shrink.pruning.repair import Errors, best_change
from hf_shrink.sharding import ranks

TOLERANCE = 1e-3  # of the largest value, where a block's output is checked to be a sum

Stage = tuple[int, nn.Module]  # a matrix, and the place of its block among those that are led


def lead(
    walk: StackWalk, blocks: int, stages: Sequence[Stage], targets: Iterable[Tensor], held_out: Sequence[Tensor]
) -> float:
    """Refit matrices of the next blocks, in place, so that the stream behind them is nearest to the targets.

    What a matrix adds to the stream reaches the end of the row, because the stream is a sum; what the blocks on its way
    make of it, least squares cannot foresee, and the matrices behind make up for it. So they share the work: each is
    fitted together with all behind it, to what is missing now, and is changed by one part of as many as are left.

    Args:
        walk: in front of the first of the blocks; afterwards behind the last.
        stages: in the order in which they run.
        targets: (batch, sequence, width) for every batch of the walk; gone through once for every matrix.
        held_out: for every batch, bool (sequences,): which choose the damping.

    Returns:
        The share of the error on the sequences held out that is gone.
    """
    device = walk.hidden[0].device if len(walk.hidden) else torch.device("cpu")
    first, left, done = None, 0.0, 0
    for number, (place, writer) in enumerate(stages):
        done += _advance(walk, place - done, device)
        waiting = [module for _, module in stages[number:]]
        errors = _errors(walk, blocks - done, waiting, targets, held_out)
        change, gain = best_change(errors)
        first = errors.size if first is None else first
        left = errors.size * (1 - gain)
        _change(writer, change, len(waiting))
    _advance(walk, blocks - done, device)
    return 1 - left / first if first else 0.0


def _advance(walk: StackWalk, blocks: int, device: torch.device) -> int:
    for _ in range(blocks):
        with fast_precision(device):  # anew: autocast keeps weights that it has cast until it ends
            walk.advance()
    return blocks


def _errors(
    walk: StackWalk,
    blocks: int,
    waiting: Sequence[nn.Module],
    targets: Iterable[Tensor],
    held_out: Sequence[Tensor],
) -> Errors:
    """Of the inputs of all waiting matrices side by side, and of ones where the last has a bias."""
    weight = matrix(waiting[0])
    bias = _bias(waiting[-1]) is not None
    widths = sum(matrix(module).shape[1] for module in waiting)
    errors = Errors.empty(weight.shape[0], widths + bias, weight.device)
    for batch, target in enumerate(targets):
        with fast_precision(target.device), _watching(waiting) as seen:
            output = ahead(walk, batch, blocks)
        target = target.to(output.device)  # blocks of a dispatched model may be on several
        x = torch.cat([seen[module][0].reshape(*target.shape[:2], -1) for module in waiting], dim=-1)
        if bias:
            x = torch.cat([x, x.new_ones(*x.shape[:-1], 1)], dim=-1)
        mask = walk.mask(batch)
        real = torch.ones(target.shape[:2], dtype=torch.bool, device=target.device) if mask is None else mask
        for held in (False, True):
            rows = real & (held_out[batch].to(real.device) == held)[:, None]
            errors.add(x[rows], (target - output)[rows], target[rows], held_out=held)
    errors.merge(walk.share)
    return errors


def _change(writer: nn.Module, change: Tensor, waiting: int) -> None:
    """Add a matrix's part of the change: the first columns; the last matrix's bias goes with that one."""
    weight, bias = matrix(writer), _bias(writer)
    weight += (change[:, : weight.shape[1]] / waiting).to(weight.dtype)
    if waiting == 1 and bias is not None:
        bias.data += change[:, -1].to(bias.dtype)


def _bias(module: nn.Module) -> nn.Parameter | None:
    return module.bias if isinstance(module.bias, nn.Parameter) else None


@contextmanager
def _watching(writers: Sequence[nn.Module]) -> Iterator[dict[nn.Module, tuple[Tensor, Tensor]]]:
    """Inputs and outputs of matrices while blocks run."""
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def see(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        seen[module] = args[0], output

    with ExitStack() as stack:
        for writer in writers:
            stack.callback(writer.register_forward_hook(see).remove)
        yield seen


def sums(walk: StackWalk, blocks: Sequence[nn.Module], writers: Sequence[Sequence[nn.Module]]) -> list[bool]:
    """Of each of the next blocks, whether its output is its stream plus what its writers put out, on the first batch.

    Only then does what one of them adds reach the blocks behind.
    """
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def see(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        seen[module] = split_hidden(args, kwargs)[0], first_output(output)

    found = []
    if len(walk.hidden):
        with ExitStack() as stack, _watching([w for own in writers for w in own]) as written:
            for block in blocks:
                stack.callback(block.register_forward_hook(see, with_kwargs=True).remove)
            ahead(walk, 0, len(blocks))
        for block, own in zip(blocks, writers, strict=True):
            entering, leaving = seen[block]
            total = entering
            fits = bool(own) and all(w in written and written[w][1].numel() == leaving.numel() for w in own)
            for writer in own if fits else ():
                total = total + written[writer][1].reshape(leaving.shape)
            found.append(fits and _alike(total, leaving))
    return ranks().from_first(found)


def adds(walk: StackWalk, writer: nn.Module) -> bool:
    """Whether the next block's output is something plus what the writer puts out, tried on the first batch."""
    written: list[Tensor] = []

    def silence(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        written.append(output)
        return torch.zeros_like(output)

    found = False
    if len(walk.hidden):
        whole = ahead(walk, 0, 1)
        handle = writer.register_forward_hook(silence)
        try:
            rest = ahead(walk, 0, 1)
        finally:
            handle.remove()
        found = len(written) == 1 and written[0].numel() == rest.numel()
        found = found and _alike(rest + written[0].reshape(rest.shape), whole)
    return bool(ranks().from_first(found))


def _alike(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= TOLERANCE * other.abs().max())
