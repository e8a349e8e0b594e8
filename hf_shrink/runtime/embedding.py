"""An embedding whose weight stays packed: only the rows that are looked up are unpacked."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_shrink.errors import RecipeError
from hf_shrink.ops.quantized import QuantizedWeight
from hf_shrink.plan import Scheme
from hf_shrink.runtime.packed import PackedModule
from hf_shrink.runtime.packing import scaled


class CompressedEmbedding(PackedModule):
    """Rows of a packed weight by index. Its state dict is what a compressed-tensors checkpoint holds.

    A model's own scaling of embeddings (`embed_scale`) belongs to the wrapper that owns this module.

    Attributes:
        num_embeddings, embedding_dim, padding_idx: as of nn.Embedding.
    """

    def __init__(
        self,
        scheme: Scheme,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        if scheme.activation_bits < 16:
            raise RecipeError(
                f"the input of an embedding is indices, which {scheme.name} cannot round; use W8A16 for it"
            )
        super().__init__(scheme, num_embeddings, embedding_dim, dtype, device)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx

    @classmethod
    def empty(
        cls,
        scheme: Scheme,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> CompressedEmbedding:
        """All zeros (or meta tensors), to load a state dict into. `dtype`: of the scales and of `weight`."""
        return cls(scheme, num_embeddings, embedding_dim, padding_idx, dtype, device)

    @classmethod
    def from_quantized(cls, quantized: QuantizedWeight, padding_idx: int | None = None) -> CompressedEmbedding:
        """From a method's result."""
        rows, columns = quantized.values.shape
        grid = quantized.grid
        embedding = cls(grid.scheme, rows, columns, padding_idx, grid.scale.dtype, "meta")
        embedding._fill(quantized)
        return embedding

    def forward(self, input: Tensor) -> Tensor:
        """As nn.Embedding: indices (...) to (..., embedding_dim) in the dtype of `weight`.

        Raises:
            IndexError: on the CPU and outside compiled graphs, an index is negative or too large.
        """
        rows = input.flatten()
        self._check(rows)
        zero_point = self._zero_point()
        if self.scheme.strategy != "tensor":
            zero_point = None if zero_point is None else zero_point[rows]
        if self.kernel is not None:  # of a head that shares the weight
            with torch.no_grad():
                values, scale = self.kernel.values(rows), self.kernel.scale(rows)
                found = scaled(values, scale, zero_point, self.scheme, self.weight_dtype)
        else:
            scale = self.weight_scale if self.scheme.strategy == "tensor" else self.weight_scale[rows]
            found = self._unpack(self.weight_packed[rows], scale, zero_point)
        return found.view(*input.shape, self.embedding_dim)

    def _check(self, rows: Tensor) -> None:
        """Negative rows would be counted from the end, and a kernel has some of zeros behind the last. On other devices
        looking would wait for them."""
        if rows.device.type != "cpu" or torch.compiler.is_compiling() or not rows.numel():
            return
        lowest, highest = rows.aminmax()
        if lowest < 0 or highest >= self.num_embeddings:
            raise IndexError(
                f"index {int(lowest if lowest < 0 else highest)} is out of range for an embedding of "
                f"{self.num_embeddings} rows; give it ids of the model's own tokenizer"
            )

    def extra_repr(self) -> str:
        """For print(model)."""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, {self._describe()}"
