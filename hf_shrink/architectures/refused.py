"""Model types that would come out wrong without an error, and why."""

from __future__ import annotations

from torch import nn

from hf_shrink.errors import ArchitectureError

REFUSED = {
    "rwkv": "its forward divides weights in place and multiplies them back for training, so that what is saved depends "
    "on what ran before, and packed weights do not take part",
}


def check_type(model: nn.Module) -> None:
    """Raises ArchitectureError for a model type that cannot be compressed right."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in REFUSED:
        raise ArchitectureError(f"{model_type} models cannot be compressed: {REFUSED[model_type]}; use another model")
