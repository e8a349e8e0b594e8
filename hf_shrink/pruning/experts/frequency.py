"""Frequency: an expert matters as often as tokens are sent to it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_shrink.pruning.base import EXPERTS, ExpertView


@EXPERTS.register("frequency")
@dataclass(frozen=True)
class Frequency:
    """How many tokens the router sends to an expert: the baseline of REAP and M-SMoE (arXiv 2510.13999, 2310.01334).

    Attributes:
        merge: as of `reap`. With it, this is M-SMoE's choice of what stays.
    """

    merge: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.merge, bool):
            raise ValueError(f"merge must be true or false, not {self.merge!r}")

    def score(self, view: ExpertView) -> Tensor:
        """See `ExpertMethod.score`."""
        return view.tokens.double()
