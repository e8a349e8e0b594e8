"""How far predictions are from the dense model's, with gradients, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Head = tuple[Tensor, Tensor | None]  # weight (classes, width) and bias (classes,)
CHUNK = 2**24  # logits made and handled at once, in elements
CHUNK_CPU = 2**23  # there, larger tensors come fresh from the system each time: half as long again (2048 x 49152)
ROWS = 2**21  # logits that are there already, handled at once, in elements: what stays in a cache


def head_divergence(rows: Tensor, target: Tensor, head: Head, target_head: Head) -> Tensor:
    """Mean over rows of KL(softmax(target head) || softmax(head)) in nats; its gradient reaches `rows` only.

    The logits are never there all at once: each chunk's gradient is taken in the forward pass. Products are in the
    autocast dtype where autocast is on, softmax in float32.

    Args:
        rows: (n, width) what the model hands to its head.
        target: (n, width) what the dense model handed to its own.
    """
    return _HeadDivergence.apply(rows, target, head, target_head)  # type: ignore[no-untyped-call,no-any-return]


class _HeadDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, target: Tensor, head: Head, target_head: Head) -> Tensor:
        kind = rows.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
        weight, target_weight = head[0].to(dtype), target_head[0].to(dtype)
        total = torch.zeros((), dtype=torch.float64, device=rows.device)
        gradient = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        step = max(1, (CHUNK_CPU if kind == "cpu" else CHUNK) // len(weight))
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            own = _log_probabilities(rows[part].to(dtype), weight, head[1])
            dense = _log_probabilities(target[part].to(dtype), target_weight, target_head[1])
            wanted = dense.exp()
            total += (wanted * dense.sub_(own)).sum(dtype=torch.float64)
            if gradient is not None:
                gradient[part] = (own.exp_().sub_(wanted) / len(rows)).to(dtype) @ weight
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return (total / len(rows)).float()

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer.to(gradient.dtype), None, None, None


def _log_probabilities(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = (rows @ weight.T).float()
    return (logits if bias is None else logits.add_(bias.float())).log_softmax(-1)


def logit_divergence(rows: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean over rows of T² KL(softmax(target / T) || softmax(rows / T)) in nats, both (n, classes) logits.

    T² keeps gradients as large as they are at T = 1 (Hinton et al., arXiv 1503.02531). Softmax is in float32, a few
    rows at a time; the gradient reaches `rows` only.
    """
    return _LogitDivergence.apply(rows, target, temperature)  # type: ignore[no-untyped-call,no-any-return]


class _LogitDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, target: Tensor, temperature: float) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=rows.device)
        gradient = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        for part in _parts(rows):
            own = (rows[part].float() / temperature).log_softmax(-1)
            dense = (target[part].float() / temperature).log_softmax(-1)
            wanted = dense.exp()
            total += (wanted * dense.sub_(own)).sum(dtype=torch.float64)
            if gradient is not None:
                gradient[part] = own.exp_().sub_(wanted).mul_(temperature / len(rows))
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return (total * (temperature**2 / len(rows))).float()

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer.to(gradient.dtype), None, None


@dataclass(frozen=True)
class Largest:
    """What is kept of a distribution: its largest probabilities, and the mass of all others together.

    Attributes:
        probabilities: (n, k) float.
        indices: (n, k) int64, the classes that they are of; all different within a row.
        rest: (n,) float.
    """

    probabilities: Tensor
    indices: Tensor
    rest: Tensor


def largest(logits: Tensor, k: int, temperature: float = 1.0) -> Largest:
    """The k largest probabilities of softmax(logits / T), (n, classes), in descending order, and the others' mass."""
    kept = Largest(
        torch.empty(len(logits), k, device=logits.device),
        torch.empty(len(logits), k, dtype=torch.long, device=logits.device),
        torch.empty(len(logits), device=logits.device),
    )
    for part in _parts(logits):
        probabilities = (logits[part].float() / temperature).softmax(-1)
        kept.probabilities[part], kept.indices[part] = probabilities.topk(k, dim=-1)
        kept.rest[part] = probabilities.scatter_(-1, kept.indices[part], 0.0).sum(-1)
    return kept


def largest_divergence(rows: Tensor, target: Largest, temperature: float = 1.0) -> Tensor:
    """As `logit_divergence`, of what `target` keeps: the classes that it does not name count as one.

    It is below the divergence of the whole distributions, and equal to it where nothing is left out.
    """
    return _LargestDivergence.apply(  # type: ignore[no-untyped-call,no-any-return]
        rows, target.probabilities, target.indices, target.rest, temperature
    )


class _LargestDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, probabilities: Tensor, indices: Tensor, rest: Tensor, temperature: float
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=rows.device)
        gradient = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        for part in _parts(rows):
            wanted, index, others = probabilities[part].float(), indices[part], rest[part].float()[:, None]
            own = (rows[part].float() / temperature).log_softmax(-1)
            named = own.gather(-1, index)
            own.exp_()
            own_others = own.scatter(-1, index, 0.0).sum(-1, keepdim=True).clamp_(min=1e-30)
            total += (torch.special.xlogy(wanted, wanted) - wanted * named).sum(dtype=torch.float64)
            left = torch.special.xlogy(others, others) - torch.special.xlogy(others, own_others)
            total += left.sum(dtype=torch.float64)
            if gradient is not None:
                ratio = torch.where(others > 0, others / own_others, 0.0)
                own.mul_(1 - ratio).scatter_(-1, index, named.exp_().sub_(wanted))
                gradient[part] = own.mul_(temperature / len(rows))
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return (total * (temperature**2 / len(rows))).float()

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer.to(gradient.dtype), None, None, None, None


def _parts(rows: Tensor) -> Iterator[slice]:
    """Slices of rows, of about ROWS elements each."""
    step = max(1, ROWS // rows.shape[1])
    return (slice(start, start + step) for start in range(0, len(rows), step))


def state_error(rows: Tensor, target: Tensor) -> Tensor:
    """||rows - target||² / ||target||², both (n, width) hidden states."""
    return (rows.float() - target).square().sum() / target.square().sum().clamp_min(1e-30)
