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


def working_device(name: str | None, weights: int) -> tuple[torch.device, str | None]:
    """As `chosen_device`, for a model of so many bytes that is worked on whole.

    Returns:
        The device, and a note where an accelerator that was not asked for by name is left alone.

    Raises:
        ArchitectureError: there is no such device here, or the model does not fit the one asked for by name.
    """
    device = chosen_device(name)
    free = free_on(device)
    if free is None or weights <= ROOM * free:
        return device, None
    why = f"its weights ({weights / 1e9:.1f} GB) are more than {ROOM:.0%} of the {free / 1e9:.1f} GB free on {device}"
    remedy = "load it with device_map='auto' over several devices and call hf_shrink.shrink"
    if name is not None:
        raise ArchitectureError(f"the model does not fit: {why}; {remedy}, or take --device cpu (device='cpu')")
    return torch.device("cpu"), f"the CPU does the work: the model does not fit the accelerator, {why}; {remedy}"


def move(model: nn.Module, device: torch.device) -> None:
    """Put a streamed model on an accelerator, whole; on the CPU it stays where it is."""
    residence = residence_of(model)
    assert residence is not None
    if device.type != "cpu":
        residence.move(device)
