"""A model's packed Linears and norms made trainable, and closed again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_shrink.runtime.linear import CompressedLinear
from hf_shrink.runtime.trainable import TrainableLinear
from hf_shrink.tuning.options import Tuning


class Vector(NamedTuple):
    """A norm's weight or a bias.

    Attributes:
        owner, name: where it is.
        before: what was there.
        tuned: float32, what the optimizer changes.
    """

    owner: nn.Module
    name: str
    before: nn.Parameter
    tuned: nn.Parameter


@dataclass
class Opened:
    """A model while it is tuned.

    Attributes:
        dtype: of the model.
        linears: what stands in the place of the packed Linears, by path.
        packed: the packed Linears that were there.
        vectors: every norm's weight and every bias.
        asked: the parameters that wanted gradients before.
    """

    model: PreTrainedModel
    dtype: torch.dtype
    linears: dict[str, TrainableLinear]
    packed: dict[str, CompressedLinear]
    vectors: list[Vector]
    asked: list[nn.Parameter]

    def parameter_groups(self, options: Tuning) -> list[dict[str, Any]]:
        """For the optimizer: scales; norms and biases; zero points and roundings where these are trained."""
        groups: list[dict[str, Any]] = [
            {"params": [linear.log_scale], "lr": options.scale_rate(linear.scheme.bits)}
            for linear in self.linears.values()
        ]
        opened = [linear for linear in self.linears.values() if isinstance(linear.steps, nn.Parameter)]
        integers = [number for linear in opened for number in (linear.zero, linear.steps) if number is not None]
        groups.append({"params": integers, "lr": options.integer_rate})
        rate = options.scale_rate(min((linear.scheme.bits for linear in self.linears.values()), default=8))
        for vector in self.vectors:
            size = float(vector.before.detach().float().square().mean().sqrt())
            groups.append({"params": [vector.tuned], "lr": rate * (size or 1.0)})
        return [group for group in groups if group["params"]]

    def round(self) -> None:
        """Let the model compute with norms and biases as they would be stored now; before each step.

        So everything has the dtypes that it has without tuning, and gradients reach the float32 parameters.
        """
        for owner, name, before, tuned in self.vectors:
            owner._parameters[name] = tuned.to(before.dtype)  # type: ignore[assignment]  # no Parameter: it has a history

    def close(self) -> None:
        """Pack the model as it is now; norms and biases go back to the dtype they are stored in."""
        self._ask_again()
        for owner, name, before, tuned in self.vectors:
            stored = tuned.detach().to(before.dtype)
            setattr(owner, name, nn.Parameter(stored, requires_grad=before.requires_grad))
        for path, linear in self.linears.items():
            closed = linear.packed()
            self.model.set_submodule(path, closed)

    def undo(self) -> None:
        """Put everything back that was there before."""
        for owner, name, before, _ in self.vectors:
            setattr(owner, name, before)
        for path, packed in self.packed.items():
            self.model.set_submodule(path, packed)
        self._ask_again()

    def _ask_again(self) -> None:
        for parameter in self.asked:
            parameter.requires_grad_(True)


def open_model(model: PreTrainedModel, rounding: bool) -> Opened:
    """Put trainable modules in the places of the packed Linears, and give norms and biases float32 parameters.

    A head that shares its weight with an embedding stays as it is: the embedding would not follow.

    Args:
        rounding: also make the integers trainable.
    """
    dtype = model.dtype
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    modules = {path: module for path, module in model.named_modules() if type(module) is CompressedLinear}
    packed = {path: module for path, module in modules.items() if not module.sharing}
    linears = {path: TrainableLinear(module, rounding=rounding) for path, module in packed.items()}
    for path, linear in linears.items():
        model.set_submodule(path, linear)
    vectors = [
        Vector(owner, name, vector, nn.Parameter(vector.detach().float().clone()))
        for owner in model.modules()
        for name, vector in owner._parameters.items()
        if vector is not None and vector.is_floating_point() and vector.dim() == 1
    ]
    return Opened(model, dtype, linears, packed, vectors, asked)
