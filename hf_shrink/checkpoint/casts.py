"""`.half()` and `.float()` of loaded models, which transformers refuses for everything that is quantized."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from hf_shrink.runtime import PackedModule


class _BoundCast:
    """A cast of one model, as torch has it. An object that holds the model, so that copies get one of the copy."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model, self.name = model, name

    def __call__(self) -> nn.Module:
        cast: nn.Module = getattr(nn.Module, self.name)(self.model)
        return cast


def allow_casts(model: nn.Module) -> None:
    """Let a model whose weights are packed by hf_shrink be cast, in place: of a packed weight that casts the scales."""
    if isinstance(model, PreTrainedModel) and any(isinstance(module, PackedModule) for module in model.modules()):
        vars(model).update({name: _BoundCast(model, name) for name in ("half", "float")})
