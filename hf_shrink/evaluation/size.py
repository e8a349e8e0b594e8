"""Bytes on disk and in memory."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from hf_shrink.errors import CheckpointError
from hf_shrink.runtime import PackedModule


def stored_bytes(folder: str | Path) -> int:
    """Bytes of the safetensors files of a checkpoint folder. Raises CheckpointError where there are none."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} holds no *.safetensors file; give the folder of a saved checkpoint")
    return sum(file.stat().st_size for file in files)


def unique_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and of the buffers that are saved; what is the same tensor (tied weights) counts once.

    Of a view of something larger only its own elements count. A weight that a kernel holds in its own layout counts as
    it is held.
    """
    return sum({_place(t): t.nbytes for t in [*model.parameters(), *_buffers(model), *_saved_beside(model)]}.values())


def _place(tensor: Tensor) -> tuple[object, ...]:
    """What is the same for tensors that are one in memory."""
    if tensor.device.type == "meta":  # without an address; a tied parameter is listed once already
        return (id(tensor),)
    return tensor.device, tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride()


def _buffers(model: nn.Module) -> list[Tensor]:
    """Buffers that are saved, and those in which packed modules of ours hold what is saved in another form."""
    return [
        buffer
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and (isinstance(module, PackedModule) or name not in module._non_persistent_buffers_set)
    ]


def _saved_beside(model: nn.Module) -> list[Tensor]:
    """What modules add to a checkpoint that is neither parameter nor buffer: bitsandbytes' scales.

    Packed modules of ours add nothing that they hold: what a kernel holds otherwise is made anew to be saved.
    """
    found: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, PackedModule) or next(module.children(), None) is not None:
            continue
        held = {*module._parameters, *module._buffers}
        found += [t for name, t in module.state_dict().items() if name not in held and isinstance(t, Tensor)]
    return found
