"""How many bits a weight of a model takes on average."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from hf_shrink.scheme import Scheme
from hf_shrink.training.qat.forward import rows_of


def effective_bits(model: nn.Module, schemes: Mapping[str, Scheme]) -> float:
    """Bits that a parameter takes on average once the weights at the paths of `schemes` are packed, scales included.

    Args:
        model: dense. Parameters that modules share count once.
    """
    packed: dict[int, int] = {}  # bytes of a weight, by its identity
    for path, scheme in schemes.items():
        module = model.get_submodule(path)
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        rows, columns = rows_of(module).shape
        packed[id(weight)] = scheme.stored_bytes(rows, columns, weight.element_size())
    parameters = list(model.parameters())
    taken = sum(packed.get(id(p), p.numel() * p.element_size()) for p in parameters)
    return 8 * taken / max(sum(p.numel() for p in parameters), 1)
