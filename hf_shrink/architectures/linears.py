"""One view on the two ways in which transformers stores a matrix: nn.Linear (out, in) and Conv1D (in, out)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

MATRIX_TYPES = (nn.Linear, Conv1D)


def is_matrix(module: nn.Module) -> bool:
    """Whether the module multiplies by one dense weight matrix, and does nothing else."""
    return isinstance(module, MATRIX_TYPES) and (has_usual_forward(type(module)) or _multiplies(module))


def has_usual_forward(kind: type[nn.Module]) -> bool:
    """Whether a matrix of this class computes in the way of its base class, without a forward of its own."""
    return kind.forward in (nn.Linear.forward, Conv1D.forward)


_multiplying: dict[type, bool] = {}


def _multiplies(module: nn.Module) -> bool:
    """Whether a class with a forward of its own (a router, matrices in groups, a scaled head) only multiplies."""
    kind = type(module)
    if kind not in _multiplying:
        twin = copy.copy(module)
        generator = torch.Generator().manual_seed(0)
        weight, bias, x = (torch.randn(size, generator=generator) for size in ((6, 4), (6,), (2, 3, 4)))
        twin._parameters = {"weight": nn.Parameter(weight), "bias": nn.Parameter(bias)}
        twin.in_features, twin.out_features = 4, 6  # type: ignore[assignment]
        try:
            with torch.no_grad():
                found = twin(x)
            same = isinstance(found, Tensor) and torch.allclose(found, x @ weight.T + bias, atol=1e-5)
        except Exception:  # whatever a forward does with sizes that are not its own
            same = False
        _multiplying[kind] = same
    return _multiplying[kind]


def matrix(module: nn.Module) -> Tensor:
    """The weight as (out_features, in_features): a view, so that writes go through."""
    weight: Tensor = module.weight.data  # type: ignore[assignment]
    return weight.t() if isinstance(module, Conv1D) else weight


def bias_of(module: nn.Module) -> Tensor | None:
    """The bias, itself; None without one."""
    return module.bias.data if isinstance(module.bias, nn.Parameter) else None


def shape(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features), of quantized Linears too: nothing is unpacked."""
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]


def set_matrix(module: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Give the module a new (out, in) weight and bias, of any size; its size attributes follow."""
    out_features, in_features = weight.shape
    stored = weight.t() if isinstance(module, Conv1D) else weight
    old = module.weight
    assert isinstance(old, nn.Parameter)
    module.weight = nn.Parameter(stored.to(old.dtype).contiguous(), requires_grad=old.requires_grad)
    if bias is not None:
        module.bias = nn.Parameter(bias.contiguous(), requires_grad=old.requires_grad)
    if isinstance(module, Conv1D):
        module.nf, module.nx = out_features, in_features
    else:
        module.out_features, module.in_features = out_features, in_features  # type: ignore[assignment]


def cut(module: nn.Module, rows: Tensor | None, columns: Tensor | None) -> None:
    """Keep the given rows (outputs, with their biases) and columns (inputs), in the order given."""
    weight = matrix(module)
    bias = module.bias.data if isinstance(module.bias, nn.Parameter) else None
    if rows is not None:
        weight = weight.index_select(0, rows.to(weight.device))
        bias = None if bias is None else bias.index_select(0, rows.to(weight.device))
    if columns is not None:
        weight = weight.index_select(1, columns.to(weight.device))
    set_matrix(module, weight, bias)


def resize(module: nn.Module, out_features: int, in_features: int) -> None:
    """Give the module an uninitialised weight of another size on its device (for skeletons)."""
    old = module.weight
    assert isinstance(old, nn.Parameter)
    bias = None
    if isinstance(module.bias, nn.Parameter):
        bias = torch.empty(out_features, dtype=old.dtype, device=old.device)
    set_matrix(module, torch.empty(out_features, in_features, dtype=old.dtype, device=old.device), bias)
