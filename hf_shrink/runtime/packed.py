"""What packed modules share: the buffers of a compressed-tensors checkpoint and a dense weight on access."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_shrink.ops.grid import Grid
from hf_shrink.ops.quantized import QuantizedWeight
from hf_shrink.plan import Scheme
from hf_shrink.runtime.kernels.base import Kernel
from hf_shrink.runtime.packing import (
    pack,
    pack_zero_point,
    stored_dtype,
    stored_shape,
    unpack,
    unpack_weight,
    unpack_zero_point,
)

CHECKPOINT_BUFFERS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
_IN_KERNEL = CHECKPOINT_BUFFERS[:2]  # what a kernel holds in its own layout
_PREFIX = "kernel_"


class PackedModule(nn.Module):
    """A module whose weight (rows, columns) is held packed, and only packed.

    It is held as a checkpoint holds it or, after `use_kernel`, in a kernel's layout. Then `weight_packed` and
    `weight_scale` are made anew, bit for bit, whenever they are asked for, also for a state dict.

    Attributes:
        scheme: bits, symmetry, strategy, group size.
        compute_dtype: dtype of `weight`; None means the scale's. Casting the module sets it back to None.
        weight_packed: int32 (rows, ceil(columns * bits / 32)). Schemes that are not packed (W8A8, FP8A16): int8 or
            float8_e4m3fn (rows, columns); a checkpoint calls this one `weight`, see `checkpoint_names`.
        weight_scale: (rows, groups), (rows, 1) per channel, (1,) per tensor.
        weight_zero_point: asymmetric schemes only: int32 (ceil(rows * bits / 32), groups); per tensor int8 (1,).
        weight_shape: int64 (2,); None for schemes that are not packed.
        sparse: the weight was pruned before it was packed in this process: training it keeps its zeros.
        kernel: what holds and multiplies the weight; None while the buffers above do (`kernel_note`: its name, or why).
        optimized: a kernel was asked for, found or not: it is again on another device.
        sharing: all modules that hold this weight, the one that is saved first (`share`); empty where it is alone.
        kept_dense: a dense copy of the weight, while many products in a row are made with it (`unpacked.py`).
    """

    multiplies: ClassVar[bool] = False  # whether kernels are for it

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    weight_shape: Tensor | None

    def __init__(
        self, scheme: Scheme, rows: int, columns: int, dtype: torch.dtype, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self.compute_dtype: torch.dtype | None = None
        self.sparse = False
        self.kernel: Kernel | None = None
        self.kernel_note = "not optimized"
        self.optimized = False
        self.sharing: tuple[PackedModule, ...] = ()
        self.kept_dense: Tensor | None = None
        self._rows, self._columns = rows, columns
        groups = scheme.scale_columns(columns)
        scale_shape = (1,) if scheme.strategy == "tensor" else (rows, groups)
        stored = torch.zeros(stored_shape(scheme, rows, columns), dtype=stored_dtype(scheme), device=device)
        self.register_buffer("weight_packed", stored)
        self.register_buffer("weight_scale", torch.zeros(scale_shape, dtype=dtype, device=device))
        if not scheme.symmetric:
            packed_rows = -(-rows * scheme.bits // 32)
            per_tensor = torch.zeros(1, dtype=torch.int8, device=device)
            packed = torch.zeros(packed_rows, groups, dtype=torch.int32, device=device)
            self.register_buffer("weight_zero_point", per_tensor if scheme.strategy == "tensor" else packed)
        self.register_buffer("weight_shape", torch.tensor([rows, columns], device=device) if scheme.packed else None)

    @property
    def weight(self) -> Tensor:
        """The dense weight (rows, columns), unpacked anew on every access; no gradient reaches it."""
        if self.kept_dense is not None:
            return self.kept_dense
        return self._unpack(self.weight_packed, self.weight_scale, self._zero_point())

    @property
    def unpacks(self) -> bool:
        """Whether every product unpacks the weight first."""
        return self.multiplies and self.kernel is None and self.scheme.activation_bits == 16

    @property
    def numel(self) -> int:
        """Elements of the unpacked weight."""
        return self._rows * self._columns

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.held.device

    @property
    def held(self) -> Tensor:
        """The buffer that holds the weight's values; modules that share a weight share it."""
        held = self._buffers["weight_packed" if self.kernel is None else f"{_PREFIX}weight"]
        assert held is not None
        return held

    @property
    def weight_dtype(self) -> torch.dtype:
        """dtype of `weight`, without unpacking it."""
        return self.compute_dtype or self.scale_dtype

    @property
    def scale_dtype(self) -> torch.dtype:
        """dtype of `weight_scale`."""
        return self.weight_scale.dtype if self.kernel is None else self.kernel.scale_dtype

    def optimize(self) -> None:
        """Hold the weight in the layout of the fastest kernel for its device; as a checkpoint does if there is none.

        Modules that share it and are where it is hold the same.
        """
        self.kernel_note = "its rows are looked up, not multiplied"
        self._pass_on()
        for module in self.sharing:
            if module.multiplies and module.held is self.held:
                return module.optimize()

    def use_kernel(self, kernel: Kernel) -> None:
        """Let a kernel hold the weight, which must be this module's, in place of the checkpoint's buffers."""
        self._restore()
        for name in _IN_KERNEL:
            del self._buffers[name]
        self._hold(kernel)
        self._pass_on()

    def restore(self) -> None:
        """Hold the weight as a checkpoint does again. Does nothing where it is held so."""
        self.optimized = False
        if self.kernel is not None:
            self._restore()
            self._pass_on()

    def adopt(self, other: PackedModule) -> None:
        """Hold the very tensors that another module of the same weight holds."""
        self._let_kernel_go()
        for name in CHECKPOINT_BUFFERS:
            self._buffers.pop(name, None)
            if name in other._buffers:
                self.register_buffer(name, other._buffers[name])
        if other.kernel is not None:
            self._hold(other.kernel)
        self.kernel_note = other.kernel_note

    def _pass_on(self) -> None:
        """Let the modules that share the weight hold it as this one does, those on other devices excepted."""
        place = (self.device, self.scale_dtype)
        for module in self.sharing:
            if module is not self and (module.device, module.scale_dtype) == place:
                module.adopt(self)

    def _restore(self) -> None:
        if self.kernel is None:
            return
        checkpoint = {name: getattr(self, name) for name in CHECKPOINT_BUFFERS if hasattr(self, name)}
        self._let_kernel_go()
        for name in CHECKPOINT_BUFFERS:
            self._buffers.pop(name, None)
        for name, tensor in checkpoint.items():
            self.register_buffer(name, tensor)

    def _let_kernel_go(self) -> None:
        for name in self.kernel.tensors if self.kernel is not None else ():
            delattr(self, _PREFIX + name)
        self.kernel = None

    def _hold(self, kernel: Kernel) -> None:
        for name, tensor in kernel.tensors.items():
            self.register_buffer(_PREFIX + name, tensor, persistent=False)
        self.kernel = kernel

    def __getattr__(self, name: str) -> Any:
        kernel = self.__dict__.get("kernel")
        if kernel is not None and name in _IN_KERNEL:
            if name == "weight_scale":
                return kernel.scale()
            return pack(kernel.values(), self.scheme.bits) if self.scheme.packed else kernel.values()
        return super().__getattr__(name)

    @property
    def checkpoint_names(self) -> dict[str, str]:
        """What a compressed-tensors checkpoint calls a buffer, where that is not its own name."""
        return {} if self.scheme.packed else {"weight_packed": "weight"}

    def unpacked(self) -> tuple[Tensor, Grid]:
        """The values, int8 or float8_e4m3fn (rows, columns), and their grid: what a method once chose."""
        stored = self.weight_packed
        values = unpack(stored, self.scheme.bits, self._columns) if self.scheme.packed else stored
        zero_point = self._zero_point()
        shape = (1, 1) if self.scheme.strategy == "tensor" else self.weight_scale.shape
        zero_point = None if zero_point is None else zero_point.view(shape)
        return values, Grid(self.scheme, self.weight_scale.view(shape), zero_point)

    def _zero_point(self) -> Tensor | None:
        if self.scheme.symmetric or self.weight_zero_point is None:
            return None
        return unpack_zero_point(self.weight_zero_point, self.scheme, self._rows)

    def _unpack(self, packed: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        with torch.no_grad():
            return unpack_weight(packed, scale, zero_point, self.scheme, self._columns, self.weight_dtype)

    def _fill(self, quantized: QuantizedWeight) -> None:
        """Take over a method's result; `.data`, because a view keeps all that it is a view of in memory."""
        self.sparse = quantized.sparse
        grid, bits = quantized.grid, self.scheme.bits
        if self.scheme.packed:
            self.weight_packed = pack(quantized.values, bits).data
            self.weight_shape = torch.tensor([self._rows, self._columns], device=quantized.values.device)
        else:
            self.weight_packed = quantized.values.contiguous().data
        self.weight_scale = grid.scale.reshape(self.weight_scale.shape).contiguous().data
        if grid.zero_point is not None:
            self.weight_zero_point = pack_zero_point(grid.zero_point, self.scheme).data

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        result = self._apply_alone(fn, recurse)
        self._pass_on()
        return result

    def _apply_alone(self, fn: Callable[[Tensor], Tensor], recurse: bool) -> Any:
        if self.kernel is None:
            before = self.device
            result = self._apply_to_buffers(fn, recurse)
            if self.optimized and self.device != before:
                self.optimize()
            return result
        kernel = self.kernel
        moved = fn(torch.empty(0, dtype=kernel.scale_dtype, device=self.device))
        if moved.dtype == kernel.scale_dtype and moved.device == self.device:
            result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            self._hold(kernel.with_tensors({name: getattr(self, _PREFIX + name) for name in kernel.tensors}))
            return result
        self._restore()
        result = self._apply_to_buffers(fn, recurse)
        self.optimize()
        return result

    def _apply_to_buffers(self, fn: Callable[[Tensor], Tensor], recurse: bool) -> Any:
        before, stored = self.weight_scale.dtype, self.weight_packed
        if stored.is_floating_point():  # a cast is meant for the scales: float8 values move as octets, and stay
            self.weight_packed = octets = stored.view(torch.uint8)
            result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            self.weight_packed = stored if self.weight_packed is octets else self.weight_packed.view(stored.dtype)
        else:
            result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.weight_scale.dtype != before:
            self.compute_dtype = None
        return result

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.kernel is None:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        held: dict[str, Tensor] = {}
        super()._save_to_state_dict(held, prefix, keep_vars)
        held.update({prefix + name: getattr(self, name) for name in _IN_KERNEL})
        names = sorted(held, key=[prefix + name for name in ("bias", *CHECKPOINT_BUFFERS)].index)
        destination.update({name: held[name] for name in names})

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        optimized = self.kernel is not None
        self._restore()
        super()._load_from_state_dict(*args, **kwargs)
        self._pass_on()
        if optimized:
            self.optimize()

    def _describe(self) -> str:
        scheme = self.scheme
        size = f" g{scheme.group_size}" if scheme.group_size else f" per {scheme.strategy}"
        return f"{scheme.name}{size} {'symmetric' if scheme.symmetric else 'asymmetric'}"


def count_parameters(model: nn.Module) -> int:
    """Logical parameters: every parameter once, and a packed weight's unpacked elements."""
    packed = {id(m.held): m.numel for m in model.modules() if isinstance(m, PackedModule)}
    return sum(map(_elements, model.parameters())) + sum(packed.values())


def _elements(parameter: nn.Parameter) -> int:
    """Elements of a parameter; of the weight behind it where bitsandbytes holds it in 4 bits."""
    state = getattr(parameter, "quant_state", None)
    return math.prod(state.shape) if state is not None else parameter.numel()
