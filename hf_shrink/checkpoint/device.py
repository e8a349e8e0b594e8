"""Which device a command works on, and whether a model fits there."""

from __future__ import annotations

import torch
from torch import nn

from hf_shrink.errors import ArchitectureError
from hf_shrink.residence import residence_of
from hf_shrink.sharding import ranks

ROOM = 0.6  # of what is free on an accelerator may be weights; activations and statistics need the rest
AT_WORK = ("cuda", "xpu")  # what is taken without being asked for: mps has no float64, which statistics are in


def chosen_device(name: str | None) -> torch.device:
    """The device asked for; None: the one that a launcher gave this process, else the accelerator if there is one.

    A kind of device without a number (cuda) is, in a process that was given one of that kind, that one.

    Raises:
        ArchitectureError: there is no such device here.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    given = ranks().device
    if name is None:
        if given is None and accelerator is not None and accelerator.type in AT_WORK:
            given = accelerator
        return given or torch.device("cpu")
    here = ["cpu"] if accelerator is None else [accelerator.type, "cpu"]
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    count = 1 if device.type == "cpu" else torch.accelerator.device_count()
    if device.type not in here or (device.index or 0) >= count:
        raise ArchitectureError(f"there is no device {name!r} here; there is: {', '.join(here)}")
    return given if given is not None and given.type == name else device


def free_on(device: torch.device) -> int | None:
    """Bytes of memory that are free on an accelerator; None for the CPU, and where that is not known."""
    return int(getattr(torch, device.type).mem_get_info(device)[0]) if device.type in AT_WORK else None


def settle(model: nn.Module, device: torch.device, *, asked: bool) -> str | None:
    """Put a streamed model on an accelerator: whole where it fits, else block by block when each runs.

    On the CPU it stays where it is.

    Args:
        asked: the user named the device.

    Returns:
        A note for the user where the model is not there whole.

    Raises:
        ArchitectureError: not even single blocks fit the device that the user named.
    """
    residence = residence_of(model)
    assert residence is not None
    free = free_on(device)
    if device.type == "cpu":
        return None
    if free is None or residence.weights <= ROOM * free:
        residence.move(device)
        return None
    needed = residence.needed_to_visit()
    if needed <= ROOM * free:
        residence.visit(device)
        return (
            f"the weights ({residence.weights / 1e9:.1f} GB) come to {device}, which has {free / 1e9:.1f} GB free, one "
            "block at a time"
        )
    why = f"a few blocks and the embeddings ({needed / 1e9:.1f} GB) exceed {ROOM:.0%} of the {free / 1e9:.1f} GB free"
    if asked:
        raise ArchitectureError(f"the model does not fit {device}: {why}; take --device cpu (device='cpu')")
    return f"the CPU did the work: the model does not fit {device}, {why}"
