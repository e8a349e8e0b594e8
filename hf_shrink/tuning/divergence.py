"""How far predictions are from the dense model's, with gradients, a few rows at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Head = tuple[Tensor, Tensor | None]  # weight (classes, width) and bias (classes,)
CHUNK = 2**24  # logits handled at once, in elements


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
        step = max(1, CHUNK // len(weight))
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


def logit_divergence(rows: Tensor, target: Tensor) -> Tensor:
    """Mean over rows of KL(softmax(target) || softmax(rows)) in nats, both (n, classes) logits."""
    return F.kl_div(rows.float().log_softmax(-1), target.log_softmax(-1), reduction="batchmean", log_target=True)


def state_error(rows: Tensor, target: Tensor) -> Tensor:
    """||rows - target||² / ||target||², both (n, width) hidden states."""
    return (rows.float() - target).square().sum() / target.square().sum().clamp_min(1e-30)
