"""Masks: which weights of a matrix go, and the best values of those that stay."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from hf_shrink.errors import CalibrationError
from hf_shrink.sparsity import Amount


def smallest(saliency: Tensor, count: int) -> Tensor:
    """Exactly `count` of the smallest values of each row; of equal ones those that come first.

    Args:
        saliency: (rows, columns), any dtype, without NaN.

    Returns:
        bool (rows, columns).
    """
    if count <= 0:
        return torch.zeros_like(saliency, dtype=torch.bool)
    limit = saliency.kthvalue(count, dim=1, keepdim=True).values
    below, ties = saliency < limit, saliency == limit
    room = count - below.sum(dim=1, keepdim=True)
    return below | (ties & (ties.cumsum(dim=1, dtype=torch.int32) <= room))


def pruned_of_each(saliency: Tensor, kept: int, size: int) -> Tensor:
    """N:M: of every `size` consecutive values of a row all but the `kept` largest; of equal ones the first go.

    Returns:
        bool, the shape of `saliency` (rows, columns); `size` divides the columns.
    """
    return smallest(saliency.reshape(-1, size), size - kept).view(saliency.shape)


def pruned(saliency: Tensor, amount: Amount, by_row: bool) -> Tensor:
    """Which weights an amount takes.

    Args:
        saliency: (rows, columns), any float dtype.
        by_row: a sparsity holds for every row by itself, rounded to whole weights, instead of for the whole matrix.

    Returns:
        bool (rows, columns). A threshold takes all that is at most tau, ties included, compared in float32 at least;
        a sparsity takes exactly that many.

    Raises:
        CalibrationError: NaN in the saliency.
    """
    if saliency.isnan().any():
        raise CalibrationError("the importance of the weights holds NaN; check the weights, the data or the function")
    if amount.threshold is not None:
        wide = saliency if saliency.dtype == torch.float64 else saliency.float()
        return wide <= amount.threshold
    if amount.sparsity is None:
        return pruned_of_each(saliency, *amount.numbers)
    lines = saliency if by_row else saliency.reshape(1, -1)
    return smallest(lines, whole(amount.sparsity * lines.shape[1])).view(saliency.shape)


def whole(count: float) -> int:
    """The nearest whole number, halves upwards: not Python's rounding to even."""
    return int(count + 0.5)


def refit_kept(weight: Tensor, start: Tensor, kept: Tensor, hessian: Tensor, steps: int) -> Tensor:
    """Values on a mask that best reproduce a Linear's outputs: min over V of tr((V - W) H (V - W)^T), V zero elsewhere.

    Rows have masks of their own, so each is a least-squares problem of its own; all are solved at once by conjugate
    gradients, preconditioned by H's diagonal (as ALPS does, Meng et al., arXiv 2406.07831).

    Args:
        weight: W, (out, in) float32.
        start: first V, (out, in), zero where `kept` is not.
        kept: bool (out, in).
        hessian: H, (in, in) float32, positive on the diagonal.
        steps: of the iteration.

    Returns:
        V, (out, in) float32; no row is worse than that of `start`.
    """
    mask = kept.to(weight.dtype)
    inverse = hessian.diagonal().reciprocal()
    values = start * mask
    residual = ((weight - values) @ hessian).mul_(mask)
    before = _losses(weight - values, hessian)
    direction = residual * inverse
    size = (residual * direction).sum(1, keepdim=True)
    for _ in range(steps):
        moved = (direction @ hessian).mul_(mask)
        curvature = (direction * moved).sum(1, keepdim=True)
        rate = torch.where(curvature > 0, size / curvature, 0.0)
        values += rate * direction
        residual -= rate * moved
        scaled = residual * inverse
        new = (residual * scaled).sum(1, keepdim=True)
        direction = scaled + torch.where(size > 0, new / size, 0.0) * direction
        size = new
    better = _losses(weight - values, hessian) < before
    return torch.where(better[:, None], values, start * mask)


def _losses(difference: Tensor, hessian: Tensor) -> Tensor:
    """(out,) the loss of every row."""
    return ((difference @ hessian) * difference).sum(1)


def shared_counts(parts: Callable[[], Iterable[Tensor]], count: int) -> list[int]:
    """How many of each tensor's values are among the `count` smallest of all tensors together.

    The tensors are looked at one after the other, three times, so that they need not exist at once. Values are compared
    in float32; of equal ones those that come first count.

    Args:
        parts: makes the tensors anew; the same ones in every call, without NaN.
        count: at most the number of all values.
    """
    if count <= 0:
        return [0 for _ in parts()]
    high = sum(torch.bincount((_ordered(part) >> 16) + 32768, minlength=65536) for part in parts())
    assert isinstance(high, Tensor)
    bucket = int((high.cumsum(0) >= count).nonzero()[0])
    rest = count - int(high[:bucket].sum())
    inside = (keys[keys >> 16 == bucket - 32768] & 0xFFFF for keys in map(_ordered, parts()))
    low = sum(torch.bincount(keys, minlength=65536) for keys in inside)
    assert isinstance(low, Tensor)
    place = int((low.cumsum(0) >= rest).nonzero()[0])
    ties = rest - int(low[:place].sum())
    limit = (bucket - 32768 << 16) + place
    counts = []
    for keys in map(_ordered, parts()):
        taken = min(int((keys == limit).sum()), ties)
        ties -= taken
        counts.append(int((keys < limit).sum()) + taken)
    return counts


def _ordered(values: Tensor) -> Tensor:
    """int64 (values,) whole numbers of 32 bits in the order of the float32 values."""
    bits = (values.detach().flatten().float() + 0.0).view(torch.int32)  # + 0.0: no negative zero
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64)
