"""The table in which a model looks its tokens up."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel


def token_table(model: PreTrainedModel) -> nn.Module | None:
    """None where transformers names none: the model reads no tokens, or has two towers (CLIP)."""
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return None
