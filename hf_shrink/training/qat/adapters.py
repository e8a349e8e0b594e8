"""Adapters on a weight that is trained for few bits: what is rounded is the weight with the adapters merged into it.

That is the weight that will be stored, so what is packed in the end is what was trained, and the adapters are gone.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.import_utils import is_peft_available

from hf_shrink.errors import RecipeError
from hf_shrink.training.qat.quantizer import WeightQuantizer


def adapted_layers(model: nn.Module) -> dict[int, nn.Module]:
    """The layers of a model that hold adapters, by the identity of the module that these were put on."""
    if not is_peft_available():
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return {id(layer.get_base_layer()): layer for layer in layers}


def attach_adapted(layer: nn.Module, path: str) -> None:
    """Let a layer with adapters compute with the merged weight, rounded once the base layer's quantizer is active.

    Raises:
        RecipeError: the adapters are more than a change of the weight.
    """
    from peft.tuners.lora import Linear

    reason = None
    if type(layer) is not Linear:
        reason = f"its adapters are of the kind {type(layer).__module__.removeprefix('peft.')}.{type(layer).__name__}"
    elif layer.lora_variant:
        reason = f"its adapters are of the variant {type(next(iter(layer.lora_variant.values()))).__name__}"
    elif any(layer.lora_bias.values()):
        reason = "its adapters have biases (lora_bias)"
    elif any(isinstance(dropout, nn.Dropout) and dropout.p > 0 for dropout in layer.lora_dropout.values()):
        reason = "its adapters have dropout of their own input (lora_dropout)"
    if reason is not None:
        raise RecipeError(
            f"{path}: {reason}, which no rounded weight can hold; train it for few bits with plain LoRA without "
            "dropout, or without adapters"
        )
    layer.forward = MethodType(_merged_forward, layer)


def detach_adapted(model: nn.Module) -> None:
    """Let all layers with adapters compute again as they did before `attach_adapted`."""
    for layer in adapted_layers(model).values():
        if getattr(vars(layer).get("forward"), "__func__", None) is _merged_forward:
            del layer.forward


def merged_weight(layer: Any) -> Tensor:
    """The base layer's weight, in its own shape, with the active adapters in it; with gradients to them."""
    weight: Tensor = layer.base_layer.weight
    if layer.merged or layer.disable_adapters:
        return weight
    for name in layer.active_adapters:
        if name in layer.lora_A:
            weight = weight + layer.get_delta_weight(name).to(weight.dtype)
    return weight


def _merged_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    base = self.base_layer
    quantizer: WeightQuantizer = base.weight_quantizer
    if not quantizer.active:
        output: Tensor = type(self).forward(self, x, *args, **kwargs)
        return output
    weight = merged_weight(self)
    return quantizer.linear(x, weight if isinstance(base, nn.Linear) else weight.t(), base.bias)


def weight_now(module: nn.Module, layer: nn.Module | None) -> Tensor:
    """(out_features, in_features) of a matrix, with the adapters of `layer` merged into it; no gradients.

    A view of the parameter where there are no adapters.
    """
    with torch.no_grad():
        weight = module.weight if layer is None else merged_weight(layer)
        assert isinstance(weight, Tensor)
        return weight.detach() if isinstance(module, nn.Linear | nn.Embedding) else weight.detach().t()
