"""A device that is not there: tensors that say they are on a GPU, hold their values on the CPU, and refuse company.

Whatever mixes them with tensors of the CPU as CUDA would not allow fails, so that mistakes of that kind are found on
machines without a GPU. Kernels are the CPU's: this says nothing about numbers or speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only

DEVICE = torch.device("cuda", 0)
BENEATH = torch.device("lazy", 0)  # what torch itself takes it for: a type that runs backward passes without a device
aten = torch.ops.aten
# Where CUDA takes what lies on the CPU: copies, and indices of what is indexed.
COPIES = {aten.copy_.default, aten._to_copy.default, aten.copy.default, aten.set_.source_Tensor}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class Elsewhere(Tensor):
    """Holds the values in `inner`, a tensor of the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined,no-any-return]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=BENEATH,
            requires_grad=False,
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return False

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        assert isinstance(value, Elsewhere), "a tensor of a GPU is given the memory of one on the CPU"
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.inner = value.inner

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            twin: Tensor = Elsewhere(self.inner.clone())
            memo[id(self)] = nn.Parameter(twin, self.requires_grad) if isinstance(self, nn.Parameter) else twin
        found: Tensor = memo[id(self)]
        return found

    def tolist(self) -> Any:
        return self.inner.tolist()

    def numpy(self, **_: Any) -> Any:  # type: ignore[override]
        raise AssertionError("numpy sees no tensor of a GPU")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Elsewhere({self.inner})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.to and len(args) > 1 and isinstance(args[1], Tensor):
            args = (args[0], args[1].device, args[1].dtype, *args[2:])
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            args = (
                args[0],
                tree_map_only(list, torch.tensor, args[1], is_leaf=lambda value: isinstance(value, list)),
                *args[2:],
            )
        if func is Tensor.__setitem__ and not isinstance(args[2], Tensor):
            args = (
                args[0],
                args[1],
                torch.tensor(args[2], dtype=args[0].dtype),
            )  # torch would make it where BENEATH is
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    own: list[Elsewhere] = []
    others: list[Tensor] = []

    def look(value: Tensor) -> Tensor:
        (own if isinstance(value, Elsewhere) else others).append(value)  # type: ignore[arg-type]
        return value

    tree_map_only(Tensor, look, (args, kwargs))
    target = kwargs.get("device")
    target = None if target is None else torch.device(target)
    if not own and (target is None or target.type not in (DEVICE.type, BENEATH.type)):
        return func(*args, **kwargs)
    if target is not None and target.type == "meta":
        return func(*tree_map_only(Elsewhere, lambda tensor: tensor.inner, args), **kwargs)
    _check(func, args, own, others)
    inner_args, inner_kwargs = tree_map_only(Elsewhere, lambda tensor: tensor.inner, (args, kwargs))
    if target is not None:
        inner_kwargs["device"] = torch.device("cpu")
    found = func(*inner_args, **inner_kwargs)
    if target is not None and target.type == "cpu":
        return found
    known = {id(tensor.inner): tensor for tensor in own}
    known |= {id(tensor): tensor for tensor in others}

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        own = known.get(id(value))
        return Elsewhere(value) if own is None else own

    return tree_map(wrapped, found)


def _check(func: Any, args: Any, own: list[Elsewhere], others: list[Tensor]) -> None:
    if func in COPIES or not own:
        return
    if func in INDEXING:
        assert isinstance(args[0], Elsewhere), f"{func}: a tensor of the CPU is indexed by one of a GPU"
        others = [args[2]] if len(args) > 2 and isinstance(args[2], Tensor) and type(args[2]) is not Elsewhere else []
    wrong = [tensor for tensor in others if tensor.dim()]
    if wrong:
        shapes = [tuple(tensor.shape) for tensor in wrong]
        raise AssertionError(f"{func}: tensors of the CPU, {shapes}, among those of a GPU")


class _Factories(TorchDispatchMode):
    """Makes tensors there where they are asked for by a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _from_values(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Of what makes tensors of Python's values, which no mode sees."""

    def there(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        gone = device is not None and torch.device(device).type in (DEVICE.type, BENEATH.type)
        made = make(*args, **kwargs) if gone else make(*args, device=device, **kwargs)
        return made.to(DEVICE) if gone else made

    return there


@contextmanager
def pretending() -> Iterator[torch.device]:
    """Inside, `tensor.to(device)` and `torch.zeros(..., device=device)` work with the device that this gives."""
    with (
        mock.patch("torch.cuda._lazy_init", lambda: None),
        mock.patch("torch.cuda.get_device_capability", lambda _: (7, 0)),
        mock.patch("torch.tensor", _from_values(torch.tensor)),
        mock.patch("torch.as_tensor", _from_values(torch.as_tensor)),
        mock.patch("torch.cuda.is_bf16_supported", lambda **_: False),
        mock.patch("torch.accelerator.synchronize", lambda *_: None),
        _Factories(),
    ):
        yield DEVICE
