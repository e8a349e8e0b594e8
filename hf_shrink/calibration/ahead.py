"""Look ahead of a walk: run the next blocks on a batch, and stay."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_shrink.calibration.capture import first_output
from hf_shrink.calibration.walk import StackWalk


def ahead(walk: StackWalk, batch: int, blocks: int) -> Tensor:
    """The hidden states of one batch behind the next so many blocks, (batch, sequence, width), without gradients."""
    hidden = walk.hidden[batch]
    with torch.no_grad(), walk.arguments.ahead(batch):
        for block in range(walk.position, walk.position + blocks):
            output = walk.run_block(batch, block, hidden)
            walk.arguments.hand(batch, block, output)
            hidden = first_output(output).to(hidden.dtype)
    return hidden
