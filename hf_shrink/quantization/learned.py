"""Learned rounding: gradient descent on which way every weight of a block is rounded, and on its scales.

The idea of AutoRound (Cheng et al., arXiv 2309.05516): a block's quantized weights are tuned together until the block
puts out what the dense block does. Different here: it begins at GPTQ's solution, moves by Adam instead of signs, learns
the scales rather than clipping ranges, and keeps the best state on held-out batches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_shrink.calibration.statistics import InputStatistics
from hf_shrink.errors import CalibrationError
from hf_shrink.plan import Scheme
from hf_shrink.quantization.base import METHODS, BlockProblem, Learnt, ModelMethod, QuantizedWeight

CHECKS = 8  # looks at the held-out batches during a block
PATIENCE = 3  # looks without a gain after which a block is done


@METHODS.register("learned")
@dataclass(frozen=True)
class Learned:
    """Another method's result, then gradient descent on rounding and scales against the dense block's output.

    Attributes:
        steps: optimizer steps a block, each on one calibration batch.
        rounding_rate: Adam's learning rate of roundings and zero points, in steps of the grid.
        scale_rate: of the logarithms of the scales.
        held_out: fraction of the batches that decides which state is kept; at least one, and not all of them.
        start: the method that it starts from, with its defaults; plain rounding where that has the lower error.
    """

    steps: int = 50
    rounding_rate: float = 0.005
    scale_rate: float = 0.001
    held_out: float = 0.125
    start: str = "gptq"
    needs_statistics: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps must be a whole number of at least 1, not {self.steps!r}")
        for name in ("rounding_rate", "scale_rate", "held_out"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be above 0 and below 1, not {getattr(self, name)!r}")
        start = METHODS.get(self.start)
        if start is Learned or issubclass(start, ModelMethod):
            raise ValueError("start must be a method that solves single weights, such as gptq or rtn")

    @property
    def follows_dense(self) -> bool:
        """As of the method that it starts from."""
        return bool(getattr(METHODS.build(self.start, {}), "follows_dense", False))

    def solve(
        self,
        weight: Tensor,
        scheme: Scheme,
        statistics: InputStatistics | None,
        *,
        scale_dtype: torch.dtype,
        kept: Tensor | None = None,
    ) -> QuantizedWeight:
        """Where learning starts: see `QuantizationMethod.solve`."""
        found = []
        for name in (self.start, "rtn"):
            method = METHODS.build(name, {})
            assert not isinstance(method, ModelMethod)
            found.append(method.solve(weight, scheme, statistics, scale_dtype=scale_dtype, kept=kept))
        return min(found, key=lambda quantized: quantized.error)

    def learn(self, block: BlockProblem, seed: int) -> Learnt:
        """Make the block's trainable weights better, in place; they end at the best state seen on held-out batches.

        Raises:
            CalibrationError: fewer than two batches, or a loss that is not finite.
        """
        if block.batches < 2:
            raise CalibrationError(
                "method learned needs at least 2 batches of calibration data, one of them held out; "
                "raise calibration.samples or lower calibration.batch_size"
            )
        held = min(block.batches - 1, max(1, round(block.batches * self.held_out)))
        training, held_out = range(block.batches - held), range(block.batches - held, block.batches)
        optimizer = torch.optim.Adam(self._groups(block), betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        generator = torch.Generator().manual_seed(seed)
        kept = _Kept([p for group in optimizer.param_groups for p in group["params"]], _mean(block, held_out))
        before, misses, step = kept.loss, 0, 0
        order: list[int] = []
        for step in range(1, self.steps + 1):
            if not order:
                order = torch.randperm(len(training), generator=generator).tolist()
            loss = block.loss(training[order.pop()])
            if not torch.isfinite(loss):
                raise CalibrationError("the loss of learned rounding is not finite; lower rounding_rate")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            if step % max(1, self.steps // CHECKS) == 0 or step == self.steps:
                misses = 0 if kept.offer(_mean(block, held_out)) else misses + 1
                if misses == PATIENCE:
                    break
        kept.restore()
        return Learnt(before, kept.loss, step)

    def _groups(self, block: BlockProblem) -> list[dict[str, Any]]:
        integers = [p for weight in block.weights for p in (weight.steps, weight.zero) if isinstance(p, nn.Parameter)]
        scales = [weight.log_scale for weight in block.weights]
        return [{"params": integers, "lr": self.rounding_rate}, {"params": scales, "lr": self.scale_rate}]

    def _rate(self, step: int) -> float:
        warm = max(1, self.steps // 20)
        return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / self.steps))


class _Kept:
    """The best parameters so far."""

    def __init__(self, parameters: Sequence[nn.Parameter], loss: float) -> None:
        self._parameters = parameters
        self._copies = [parameter.detach().clone() for parameter in parameters]
        self.loss = loss

    def offer(self, loss: float) -> bool:
        """Keep the parameters as they are now where `loss` is the lowest so far."""
        if not loss < self.loss:
            return False
        self.loss = loss
        for copy, parameter in zip(self._copies, self._parameters, strict=True):
            copy.copy_(parameter.detach())
        return True

    def restore(self) -> None:
        with torch.no_grad():
            for copy, parameter in zip(self._copies, self._parameters, strict=True):
                parameter.copy_(copy)


def _mean(block: BlockProblem, batches: Sequence[int]) -> float:
    with torch.no_grad():
        return sum(float(block.loss(batch)) for batch in batches) / len(batches)
