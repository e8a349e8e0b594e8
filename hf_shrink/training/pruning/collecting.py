"""Running scores of many units, the same in all processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, distributed

from hf_shrink.training.pruning.scoring import TrainingScore


class Collected:
    """The scores of the units of several parts, behind one another.

    Args:
        score: None: there are no gradients to look at; every unit costs the same.
        sizes: how many units each part has.
    """

    def __init__(self, score: TrainingScore | None, sizes: Sequence[int]) -> None:
        self._score, self._sizes = score, list(sizes)
        self._running = torch.zeros(sum(sizes))

    def reset(self, device: torch.device) -> None:
        self._running = torch.zeros(sum(self._sizes), device=device)

    def add(self, found: Sequence[Tensor], scale: float) -> None:
        """Count one optimizer step.

        Args:
            found: of every part, float32 (units,), what `TrainingScore.of` says.
            scale: what losses were multiplied by. A step whose gradients overflowed does not count.
        """
        assert self._score is not None
        together = torch.cat([part.to(self._running.device) for part in found])
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(together)
        if bool(torch.isfinite(together).all()):
            self._running = self._score.updated(self._running, together / scale**self._score.degree)

    def costs(self, kept: Tensor) -> list[Tensor]:
        """Of every part, float64 (units,) on the CPU, at least 0.

        Args:
            kept: bool (all units,), those that are not masked at present.
        """
        parts = zip(torch.split(self._running.double().cpu(), self._sizes), torch.split(kept, self._sizes), strict=True)
        if self._score is None:
            return [torch.ones(size, dtype=torch.float64) for size in self._sizes]
        costs = [(self._score.costs(part), there) for part, there in parts]
        return [part if self._score.returns else part * there for part, there in costs]

    def tensors(self) -> dict[str, Tensor]:
        return {"scores": self._running}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self._running = tensors["scores"].to(self._running.device)
