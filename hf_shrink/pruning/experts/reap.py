"""REAP: an expert matters as much as it adds, on average, to the tokens that are sent to it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_shrink.pruning.base import EXPERTS, ExpertView


@EXPERTS.register("reap")
@dataclass(frozen=True)
class Reap:
    """Router weight times output norm, averaged over the tokens routed to an expert (Lasby et al., arXiv 2510.13999).

    An expert that few tokens reach stays when it does much for these.

    Attributes:
        merge: put the weights of a removed expert into the kept one whose router logits are most like its own, in
            proportion to the router weight that the two got, channels matched first (M-SMoE, Li et al.,
            arXiv 2310.01334). REAP's authors find removal better where models have to write; it is the default.
    """

    merge: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.merge, bool):
            raise ValueError(f"merge must be true or false, not {self.merge!r}")

    def score(self, view: ExpertView) -> Tensor:
        """See `ExpertMethod.score`."""
        return view.energy / view.tokens.clamp_min(1)
