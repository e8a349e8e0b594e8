"""Let a matrix compute with its weight as it will be stored, while the weight stays the parameter that it was.

The module keeps its class, its weight its name, and an optimizer its state: only `forward` is another one, on the
instance, and what is learned lies in a child module. So checkpoints of a model in training have stock's names and a few
more, and what looks for Linears (PEFT, surgery, FSDP) finds them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from hf_shrink.architectures.linears import matrix
from hf_shrink.errors import RecipeError
from hf_shrink.training.qat.quantizer import WeightQuantizer

NAME = "weight_quantizer"  # of the child that holds what is learned


def quantizer_of(module: nn.Module) -> WeightQuantizer:
    """What rounds the weight of a module that something was attached to."""
    quantizer: WeightQuantizer = getattr(module, NAME)
    return quantizer


def owned_quantizers(model: nn.Module, paths: Iterable[str]) -> dict[str, WeightQuantizer]:
    """The quantizers at these paths of a model, those of shared weights once, where they are children."""
    modules = {path: model.get_submodule(path) for path in paths}
    return {path: quantizer_of(module) for path, module in modules.items() if NAME in module._modules}


def attach(module: nn.Module, quantizer: WeightQuantizer, path: str, *, owner: bool = True) -> None:
    """Let the module compute with what `quantizer` makes of its weight.

    Args:
        owner: whether the quantizer becomes the module's child; false for a module whose weight another one shares.

    Raises:
        RecipeError: something else computes in the module's place already.
    """
    if "forward" in vars(module):
        raise RecipeError(
            f"{path} has a forward that something else put there (offloading by a device_map?), so it cannot be "
            "trained for few bits; load the model without it"
        )
    if owner:
        module.add_module(NAME, quantizer)
    else:
        vars(module)[NAME] = quantizer  # an attribute and no child, so that a state dict has it once
    module.forward = MethodType(_forward_of(module), module)


def detach(module: nn.Module) -> None:
    """The module as it was before `attach`, with its weight as it is now."""
    del module.forward
    delattr(module, NAME)


def detach_all(model: nn.Module) -> None:
    """Take away all quantizers that were attached in a model, those of an earlier training that was given up."""
    for module in list(model.modules()):
        ours = getattr(vars(module).get("forward"), "__func__", None) in _FORWARDS.values()
        if ours and isinstance(getattr(module, NAME, None), WeightQuantizer):
            detach(module)


@contextmanager
def without_quantizers(model: nn.Module) -> Iterator[None]:
    """The model without what training has put beside its weights, to look at: it does not compute meanwhile."""
    beside = {module: module._modules[NAME] for module in model.modules() if NAME in module._modules}
    for module in beside:
        del module._modules[NAME]
    try:
        yield
    finally:
        for module, quantizer in beside.items():
            module._modules[NAME] = quantizer


def rows_of(module: nn.Module) -> Tensor:
    """The weight as (out_features, in_features): a view, so that writes go through."""
    if isinstance(module, nn.Embedding):
        return module.weight.data
    return matrix(module)


def _forward_of(module: nn.Module) -> Callable[..., Tensor]:
    return next(forward for kind, forward in _FORWARDS.items() if isinstance(module, kind))


def _linear(self: Any, input: Tensor) -> Tensor:
    quantizer: WeightQuantizer = self.weight_quantizer
    return quantizer.linear(input, self.weight, self.bias)


def _transposed(self: Any, input: Tensor) -> Tensor:
    quantizer: WeightQuantizer = self.weight_quantizer
    return quantizer.linear(input, self.weight.t(), self.bias)


def _embedding(self: Any, input: Tensor) -> Tensor:
    quantizer: WeightQuantizer = self.weight_quantizer
    return F.embedding(input, quantizer(self.weight), self.padding_idx)


_FORWARDS: Mapping[type[nn.Module], Callable[..., Tensor]] = {
    nn.Linear: _linear,
    Conv1D: _transposed,
    nn.Embedding: _embedding,
}
