"""Modules that hold packed weights. Their state dicts are what a compressed-tensors checkpoint holds.

Except that it calls the buffer `weight_packed` of W8A8 and FP8A16 `weight`, which here is the dense weight.
"""

from hf_shrink.runtime.embedding import CompressedEmbedding
from hf_shrink.runtime.linear import CompressedLinear
from hf_shrink.runtime.packed import PackedModule, count_parameters

__all__ = ["CompressedEmbedding", "CompressedLinear", "PackedModule", "count_parameters"]
