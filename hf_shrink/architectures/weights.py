"""One view on the weights of all modules that multiply: rows of output units, columns of what each of them reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.rnn import RNNBase, RNNCellBase
from transformers.pytorch_utils import Conv1D

from hf_shrink.architectures.linears import is_matrix

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
RECURRENT = (RNNBase, RNNCellBase)


@dataclass(frozen=True)
class WeightRef:
    """One weight of a module.

    Attributes:
        module_path: of the module that owns it.
        owner, name: where the parameter is; looked up anew whenever it is read.
    """

    module_path: str
    owner: nn.Module
    name: str

    @property
    def path(self) -> str:
        """Of the parameter, as in the state dict."""
        return f"{self.module_path}.{self.name}" if self.module_path else self.name

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter in its own shape."""
        found = getattr(self.owner, self.name)
        assert isinstance(found, nn.Parameter)
        return found

    @property
    def is_matrix(self) -> bool:
        """Whether statistics of its inputs can be had: it is the weight of a Linear (or Conv1D)."""
        return is_matrix(self.owner)

    @property
    def width(self) -> int:
        """How many consecutive columns are alike, so that N:M can count within them: a row, a filter's channels."""
        return self.parameter.shape[0 if isinstance(self.owner, Conv1D) else 1]

    def as_rows(self, tensor: Tensor) -> Tensor:
        """A tensor of the parameter's shape as (rows, columns): one row for every output unit.

        A filter's channels are next to one another, as kernels for N:M want them. A row of an embedding is a vector.
        """
        if isinstance(self.owner, Conv1D):
            return tensor.t()
        return tensor.movedim(1, -1).flatten(1)

    def write(self, rows: Tensor) -> None:
        """Put (rows, columns) in the place of the weight's values; the parameter stays the same object."""
        old = self.parameter
        if isinstance(self.owner, Conv1D):
            shaped = rows.t()
        else:
            shaped = rows.reshape(old.shape[0], *old.shape[2:], old.shape[1]).movedim(-1, 1)
        with torch.no_grad():
            old.copy_(shaped)


def weight_refs(model: nn.Module) -> Iterator[WeightRef]:
    """Every weight of a Linear, convolution, embedding, recurrent or attention module, in the model's order.

    Each parameter comes once, however many modules share it. Not: biases, norms, transposed convolutions, and weights
    that are computed from other parameters.
    """
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name in _names(module):
            parameter = module._parameters.get(name)
            if parameter is None or parameter.dim() < 2 or not parameter.is_floating_point() or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            yield WeightRef(path, module, name)


def _names(module: nn.Module) -> list[str]:
    """The parameters of a module that are weights."""
    if is_matrix(module) or isinstance(module, (*CONVOLUTIONS, nn.Embedding)):
        return ["weight"]
    if isinstance(module, RECURRENT):
        return [name for name in module._parameters if name.startswith("weight_")]
    if isinstance(module, nn.MultiheadAttention):  # its output is a Linear of its own
        return ["in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"]
    return []
