"""Exactly what tensors take in safetensors files: their bytes, and their entries in the header."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_shrink.checkpoint.loaded_dtypes import loaded_dtypes
from hf_shrink.checkpoint.targets import stored_names
from hf_shrink.plan import Scheme
from hf_shrink.runtime.packed import PackedModule

# What safetensors calls a dtype.
NAMES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
FILE = 8 + 32 + 8  # of a file besides: the header's length, `{"__metadata__":{"format":"pt"}}`, padding


class Storage:
    """Counts bytes for one model.

    Args:
        model: dense.
        dtype: what floating-point tensors are cast to before anything is quantized; None: they stay as they are.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None) -> None:
        self._dtype = dtype
        self._own = {} if dtype is None else loaded_dtypes(model, dtype)
        self._state = unique_state(model)
        paths = {name.rpartition(".")[0] for name in self._state}
        self._paths = stored_names(model, paths) if isinstance(model, PreTrainedModel) else {}
        # Offsets have as many digits as the largest can have: a few bytes too many, never too few.
        self._digits = len(str(sum(t.nbytes for t in self._state.values())))

    @property
    def state(self) -> Mapping[str, Tensor]:
        """The tensors of the model's files by name; tied ones once."""
        return self._state

    def dense(self, names: Iterable[str]) -> int:
        """Bytes of the model's own tensors of these names, as they are."""
        return sum(self.tensor(name, self.dtype_of(self._state[name], name), self._state[name].shape) for name in names)

    def dtype_of(self, tensor: Tensor, name: str = "") -> torch.dtype:
        """What a tensor is stored in."""
        if name in self._own and tensor.is_floating_point():
            return self._own[name]
        return self._dtype if self._dtype is not None and tensor.is_floating_point() else tensor.dtype

    def tensor(self, name: str, dtype: torch.dtype, shape: Iterable[int]) -> int:
        """Bytes of a tensor with its entry in the header."""
        sizes = list(shape)
        count = 1
        for size in sizes:
            count *= size
        path, dot, last = name.rpartition(".")
        name = f"{self._paths.get(path, path)}{dot}{last}"  # in files some modules have other, longer names
        text = f'"{name}":{{"dtype":"{NAMES[dtype]}","shape":[{",".join(map(str, sizes))}],"data_offsets":[,]}},'
        return count * dtype.itemsize + len(text) + 2 * self._digits

    def matrix(self, path: str, module: nn.Module, rows: int, columns: int, scheme: Scheme | None) -> int:
        """Bytes of a matrix with its bias, cut to (rows, columns).

        Args:
            module: the matrix as it is now.
            scheme: with a group size that divides `columns`; None: it stays dense.
        """
        weight = module.weight
        assert isinstance(weight, Tensor)
        dtype = self.dtype_of(weight, f"{path}.weight")
        bias = getattr(module, "bias", None)
        total = (
            self.tensor(f"{path}.bias", self.dtype_of(bias, f"{path}.bias"), (rows,)) if isinstance(bias, Tensor) else 0
        )
        if scheme is None:
            shape = (columns, rows) if isinstance(module, Conv1D) else (rows, columns)
            return total + self.tensor(f"{path}.weight", dtype, shape)
        # The packed module itself says what it holds; on the meta device it holds nothing.
        held = PackedModule(scheme, rows, columns, dtype, "meta")
        names = held.checkpoint_names
        return total + sum(
            self.tensor(f"{path}.{names.get(name, name)}", buffer.dtype, buffer.shape)
            for name, buffer in held.named_buffers()
        )


def unique_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without what is another entry under a second name (tied weights)."""
    seen: dict[tuple[Any, ...], str] = {}
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        place: tuple[Any, ...] = (
            tensor.device,
            tensor.untyped_storage().data_ptr(),
            tensor.storage_offset(),
            tuple(tensor.shape),
        )
        place = place if tensor.device.type != "meta" and tensor.numel() else (name,)
        if seen.setdefault(place, name) == name:
            found[name] = tensor
    return found
