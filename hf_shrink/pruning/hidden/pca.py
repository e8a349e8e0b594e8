"""PCA of the residual stream: directions matter as much as signals vary along them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_shrink.pruning.base import HIDDEN


@HIDDEN.register("pca")
@dataclass(frozen=True)
class Pca:
    """SliceGPT (Ashkboos et al., arXiv 2401.15024) with one rotation for the whole stream.

    The paper rotates every block's signals by a matrix of their own and adds a matrix to each residual connection to
    go from one to the next. With one matrix for all, nothing is added: it folds into the weights, and the result is a
    narrower model of the same kind.

    Attributes:
        untie: give a head that shares the embedding's weight one of its own, so that the last norm's weight folds into
            it exactly. It costs as many parameters as the narrower embedding has, on small models more than is won.
            Else both stay one, and that norm's weight is shared out between stream and embedding (see `tied_scale`):
            near where it is even, and far off where channels of much energy have an odd weight. A refit makes most of
            that good: on SmolLM2-135M, whose two loudest channels have negative ones, sharing out alone cost 2.4 nats,
            and a fifth of the stream with a refit 0.52, where untied it cost 0.48. None: only without a refit.
    """

    untie: bool | None = None

    def __post_init__(self) -> None:
        if self.untie is not None and not isinstance(self.untie, bool):
            raise ValueError(f"untie must be true or false, not {self.untie!r}")

    def directions(self, moment: Tensor) -> Tensor:
        """See `HiddenMethod.directions`."""
        values, vectors = torch.linalg.eigh(moment.double())
        ordered: Tensor = vectors[:, values.argsort(descending=True, stable=True)]
        return ordered
