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
    """Bytes of all parameters and buffers, storages that several of them share (tied weights) counted once."""
    storages: dict[tuple[object, int], int] = {}
    for tensor in [*model.parameters(), *model.buffers(), *_saved_beside(model)]:
        storage = tensor.untyped_storage()
        # Meta tensors have no address: each is its own storage (a tied parameter is listed once already).
        address = storage.data_ptr() if tensor.device.type != "meta" else id(tensor)
        storages[(tensor.device, address)] = storage.nbytes()
    return sum(storages.values())


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
