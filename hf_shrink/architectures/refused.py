"""Models that would come out wrong without an error, and why."""

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


def check_bare(model: nn.Module) -> None:
    """Raises ArchitectureError for a model inside of what `torch.compile` makes of it, or with adapters of PEFT."""
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        raise ArchitectureError(
            "this is what torch.compile made of a model; pass the model from before it, and compile the result"
        )
    for path, module in model.named_modules():
        # Told without importing that library: it takes seconds.
        if any(kind.__module__.partition(".")[0] == "peft" for kind in type(module).__mro__):
            raise ArchitectureError(
                f"{path or 'this model'} is one of PEFT ({type(module).__name__}); put its adapters into the weights "
                "first (model = peft_model.merge_and_unload()), or load the model without them"
            )
