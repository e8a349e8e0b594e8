"""Modules that hold packed weights. Their state dicts are what a compressed-tensors checkpoint holds."""

from hf_shrink.runtime.embedding import CompressedEmbedding
from hf_shrink.runtime.linear import CompressedLinear
from hf_shrink.runtime.packed import PackedModule, count_parameters

__all__ = ["CompressedEmbedding", "CompressedLinear", "PackedModule", "count_parameters"]
