"""Leave padding out of what is counted."""

from __future__ import annotations

from torch import Tensor


def without_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """The rows of a matrix's input that are not padding; some blocks merge batch and sequence before their MLP.

    Args:
        x: (batch, sequence, ...), (batch * sequence, width) or of another shape, which is left as it is.
        mask: bool (batch, sequence) of the real tokens; None when nothing is padded.
    """
    if mask is not None and x.dim() > 2 and x.shape[:2] == mask.shape:
        return x[mask.to(x.device)]
    if mask is not None and x.dim() == 2 and x.shape[0] == mask.numel():
        return x[mask.reshape(-1).to(x.device)]
    return x
