"""Which modules of a model are packed, and their schemes in hf_shrink's and in compressed-tensors' words."""

from __future__ import annotations

from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStrategy
from torch import nn

from hf_shrink.errors import CheckpointError, RecipeError
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
        type=scheme.type,
        symmetric=scheme.symmetric,
        strategy=scheme.strategy,
        group_size=scheme.group_size,
    )


def format_of(scheme: Scheme) -> CompressionFormat:
    """How compressed-tensors calls the way in which a scheme's values are stored."""
    if scheme.packed:
        return CompressionFormat.pack_quantized
    return CompressionFormat.float_quantized if scheme.type == "float" else CompressionFormat.int_quantized


def group_of(scheme: Scheme, targets: list[str]) -> QuantizationScheme:
    """A scheme and the modules it is for in compressed-tensors' words."""
    inputs = None
    if scheme.activation_bits < 16:
        inputs = QuantizationArgs(
            num_bits=scheme.activation_bits,
            type="int",
            symmetric=scheme.activation_symmetric,
            strategy="token",
            dynamic=True,
        )
    return QuantizationScheme(
        targets=targets, weights=arguments_of(scheme), input_activations=inputs, format=format_of(scheme)
    )


def scheme_of(arguments: QuantizationArgs, inputs: QuantizationArgs | None = None) -> Scheme:
    """The inverse of `arguments_of` and, with the arguments of the inputs, of `group_of`.

    Raises:
        CheckpointError: what hf_shrink does not store.
    """
    strategy = QuantizationStrategy(arguments.strategy).value
    per_token = inputs is None or (inputs.type == "int" and inputs.strategy == "token" and bool(inputs.dynamic))
    try:
        if not per_token or strategy not in ("tensor", "channel", "group"):
            raise RecipeError(f"{arguments.type} weights by {strategy}, or inputs that are not rounded token by token")
        return Scheme(
            bits=arguments.num_bits,
            symmetric=arguments.symmetric,
            strategy=strategy,
            group_size=arguments.group_size if strategy == "group" else None,
            type=arguments.type,
            activation_bits=16 if inputs is None else inputs.num_bits,
            activation_symmetric=inputs is not None and inputs.symmetric,
        )
    except RecipeError as error:
        raise CheckpointError(
            f"this checkpoint is stored in a way hf_shrink does not know: {error}; update it"
        ) from error
