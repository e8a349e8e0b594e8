"""Models that accelerate has dispatched: over several devices, or with weights that only come when a module runs."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def at_home(model: nn.Module, *, changes: bool = False) -> Iterator[bool]:
    """Let every module of a dispatched model have its weights, and run where they are: offloaded ones on the CPU.

    Weights that were offloaded to the disk lie in mapped files, of which only what is read is in memory. Afterwards the
    model is dispatched as it was, with the weights and modules that it has then.

    Args:
        changes: the model is not the same afterwards, so that what was on the disk goes to a temporary folder of ours,
            which vanishes with the model.

    Yields:
        Whether some weights were offloaded, and will be again.
    """
    found = _Dispatched.of(model)
    if found is None:
        yield False
        return
    found.gather()
    try:
        yield found.offloads
    finally:
        found.disperse(changes)


@dataclass
class _Dispatched:
    """How a model was dispatched.

    Attributes:
        places: the modules that were given a device, or "disk", with their paths.
        main: the device that everything offloaded runs on.
        hooks: accelerate's hooks that bring weights, by path of the module.
        loader: what reads the weights that lie on the disk; None where none do.
        settings: what else was said when the model was dispatched.
    """

    model: nn.Module
    places: list[tuple[str, nn.Module, Any]]
    main: Any
    hooks: dict[str, Any]
    loader: Any
    settings: dict[str, Any]

    @classmethod
    def of(cls, model: nn.Module) -> _Dispatched | None:
        """None for a model without accelerate's hooks."""
        if not any(hasattr(module, "_hf_hook") for module in model.modules()):
            return None
        hooks = {path: hook for path, module in model.named_modules() for hook in _aligning(module)}
        if not hooks:
            return None
        bringing = {path: hook for path, hook in hooks.items() if hook.offload}
        bases = (_base(hook.weights_map)[0] for hook in bringing.values())
        loader = next((base for base in bases if getattr(base, "index", None)), None)
        # Without a map the whole model was offloaded (accelerate.cpu_offload, disk_offload).
        given: Mapping[str, Any] = getattr(model, "hf_device_map", None) or {"": "disk" if loader else "cpu"}
        places = [(path, model.get_submodule(path), device) for path, device in given.items()]
        some = next(iter((bringing or hooks).values()))
        settings = {"skip_keys": some.skip_keys, "offload_buffers": some.offload_buffers}
        return cls(model, places, some.execution_device, bringing, loader, settings)

    @property
    def offloads(self) -> bool:
        return bool(self.hooks)

    def gather(self) -> None:
        """Take the hooks off; all weights where they belong."""
        from accelerate import dispatch_model
        from accelerate.hooks import remove_hook_from_module
        from accelerate.utils import named_module_tensors

        known: dict[int, nn.Parameter] = {}  # tied ones come from one tensor
        for path, hook in self.hooks.items():
            module = self.model.get_submodule(path)
            names = [name for name, _ in named_module_tensors(module, True, hook.place_submodules)]
            for name in names:
                owner, _, last = name.rpartition(".")
                holder = module.get_submodule(owner)
                held = getattr(holder, last)
                if held.device.type != "meta":
                    continue
                value = _value(hook.weights_map, name)
                if isinstance(held, nn.Parameter):
                    made = nn.Parameter(value, requires_grad=held.requires_grad)
                    setattr(holder, last, known.setdefault(value.data_ptr(), made))
                else:
                    setattr(holder, last, value)
            hook.original_devices = {}  # else taking it off would bring the weights once more
        remove_hook_from_module(self.model, recurse=True)
        tie = getattr(self.model, "tie_weights", None)
        if callable(tie):
            tie()
        homes = {path: "cpu" if device == "disk" else device for path, _, device in self.places}
        if len(set(homes.values())) > 1:
            dispatch_model(self.model, homes, main_device="cpu", force_hooks=True, skip_keys=self.settings["skip_keys"])
        vars(self.model).pop("hf_device_map", None)  # nothing has to be brought from anywhere

    def disperse(self, changed: bool) -> None:
        """Dispatch the model as it was: what became of each module goes where that was."""
        from accelerate import cpu_offload, disk_offload, dispatch_model
        from accelerate.hooks import remove_hook_from_module

        remove_hook_from_module(self.model, recurse=True)
        now = {id(module): path for path, module in self.model.named_modules()}
        paths = set(now.values())
        devices = {}
        for path, module, device in self.places:
            path = now.get(id(module), path)
            if path in paths:
                devices[path] = device
        folder = index = None
        if self.loader is not None and changed:
            folder = tempfile.mkdtemp(prefix="hf_shrink_offload_")
            weakref.finalize(self.model, rmtree, folder, True)
        elif self.loader is not None:
            folder, index = self.loader.save_folder, self.loader.index
        buffers = self.settings["offload_buffers"] or changed  # packed weights are buffers
        if list(devices) == [""] and folder is not None:
            disk_offload(self.model, folder, self.main, offload_buffers=buffers)
        elif list(devices) == [""] and self.offloads:
            cpu_offload(self.model, self.main, offload_buffers=buffers)
        else:
            offloading = {**self.settings, "offload_dir": folder, "offload_index": index, "offload_buffers": buffers}
            dispatch_model(self.model, devices, main_device=self.main, force_hooks=True, **offloading)


def _aligning(module: nn.Module) -> list[Any]:
    """The module's hooks that care for devices."""
    from accelerate.hooks import AlignDevicesHook, SequentialHook

    hook = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return [one for one in hooks if isinstance(one, AlignDevicesHook)]


def _base(weights: Any) -> tuple[Any, str]:
    """Where a module's weights come from in the end, and what their names there begin with."""
    from accelerate.utils import PrefixedDataset

    prefix = ""
    while isinstance(weights, PrefixedDataset):
        weights, prefix = weights.dataset, weights.prefix + prefix
    return weights, prefix


def _value(weights: Any, name: str) -> Tensor:
    """A weight on the CPU; of a file of accelerate's it is mapped."""
    base, prefix = _base(weights)
    key = prefix + name
    entry = getattr(base, "index", {}).get(key)
    if entry is None or "safetensors_file" in entry or key in base.state_dict:
        value: Tensor = weights[name]
        return value.to("cpu")
    dtype, shape = getattr(torch, entry["dtype"]), torch.Size(entry["shape"])
    file = str(Path(base.save_folder) / f"{key}.dat")
    flat: Tensor = torch.from_file(file, shared=False, size=shape.numel(), dtype=dtype)
    return flat.view(shape)
