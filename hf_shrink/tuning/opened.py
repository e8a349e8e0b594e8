"""A model's packed Linears and norms made trainable, and closed again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_shrink.runtime.linear import CompressedLinear
from hf_shrink.runtime.trainable import TrainableLinear
from hf_shrink.tuning.options import Tuning


@dataclass
class Opened:
    """A model while it is tuned.

    Attributes:
        linears: what stands in the place of the packed Linears, by path.
        packed: the packed Linears that were there.
        vectors: owner and name of every norm's weight and every bias, with what was there.
        asked: the parameters that wanted gradients before.
    """

    model: nn.Module
    linears: dict[str, TrainableLinear]
    packed: dict[str, CompressedLinear]
    vectors: list[tuple[nn.Module, str, nn.Parameter]]
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
        for owner, name, before in self.vectors:
            size = float(before.detach().float().square().mean().sqrt())
            groups.append({"params": [getattr(owner, name)], "lr": rate * (size or 1.0)})
        return [group for group in groups if group["params"]]

    def close(self) -> None:
        """Pack the model as it is now; norms and biases go back to the dtype they are stored in."""
        self._ask_again()
        for owner, name, before in self.vectors:
            tuned = getattr(owner, name).detach().to(before.dtype)
            setattr(owner, name, nn.Parameter(tuned, requires_grad=before.requires_grad))
        for path, linear in self.linears.items():
            closed = linear.packed()
            self.model.set_submodule(path, closed)

    def undo(self) -> None:
        """Put everything back that was there before."""
        for owner, name, before in self.vectors:
            setattr(owner, name, before)
        for path, packed in self.packed.items():
            self.model.set_submodule(path, packed)
        self._ask_again()

    def _ask_again(self) -> None:
        for parameter in self.asked:
            parameter.requires_grad_(True)


def open_model(model: nn.Module, rounding: bool) -> Opened:
    """Put trainable modules in the places of the packed Linears, and make norms and biases float32 parameters.

    A head that shares its weight with an embedding stays as it is: the embedding would not follow.

    Args:
        rounding: also make the integers trainable.
    """
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    modules = {path: module for path, module in model.named_modules() if type(module) is CompressedLinear}
    packed = {path: module for path, module in modules.items() if not module.sharing}
    linears = {path: TrainableLinear(module, rounding=rounding) for path, module in packed.items()}
    for path, linear in linears.items():
        model.set_submodule(path, linear)
    vectors: list[tuple[nn.Module, str, nn.Parameter]] = []
    for owner in model.modules():
        for name, vector in list(owner._parameters.items()):
            if vector is None or not vector.is_floating_point() or vector.dim() != 1:
                continue
            vectors.append((owner, name, vector))
            setattr(owner, name, nn.Parameter(vector.detach().float().clone()))
    return Opened(model, linears, packed, vectors, asked)
