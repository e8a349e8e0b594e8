"""Which modules of a model are packed, and their schemes in hf_shrink's and in compressed-tensors' words."""

from __future__ import annotations

from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from torch import nn

from hf_shrink.errors import CheckpointError
from hf_shrink.plan import Scheme
from hf_shrink.runtime import PackedModule


def packed_modules(model: nn.Module) -> dict[str, PackedModule]:
    """The compressed modules of a model by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, PackedModule)}


def packed_schemes(model: nn.Module) -> dict[str, Scheme]:
    """The schemes of a model's compressed modules by path."""
    return {path: module.scheme for path, module in packed_modules(model).items()}


def arguments_of(scheme: Scheme) -> QuantizationArgs:
    """A scheme in compressed-tensors' words."""
    return QuantizationArgs(
        num_bits=scheme.bits,
        type="int",
        symmetric=scheme.symmetric,
        strategy=scheme.strategy,
        group_size=scheme.group_size,
    )


def scheme_of(arguments: QuantizationArgs) -> Scheme:
    """The inverse of `arguments_of`. Raises CheckpointError for what hf_shrink does not store."""
    strategy = QuantizationStrategy(arguments.strategy).value
    if arguments.type != "int" or strategy not in ("tensor", "channel", "group"):
        raise CheckpointError(
            f"this checkpoint's weights are {arguments.type} {strategy}; hf_shrink stores integers by tensor, channel "
            "or group: update hf_shrink"
        )
    return Scheme(
        bits=arguments.num_bits,
        symmetric=arguments.symmetric,
        strategy=strategy,
        group_size=arguments.group_size if strategy == "group" else None,
    )
