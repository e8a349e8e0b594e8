"""What launchers do to the processes that they start."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from hf_shrink.errors import RecipeError
from hf_shrink.sharding.ranks import SIZES, Ended, Ranks


def launched_first() -> bool:
    """Whether this process is the first one, before it has met the others."""
    return os.environ.get("RANK", "0") == "0"


def check_started() -> None:
    """Raises RecipeError where accelerate was asked for several processes and started one, without a word."""
    # It names the others a place to meet, but neither their number nor this one's rank.
    if {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= os.environ.keys() and not any(name in os.environ for name in SIZES):
        raise RecipeError(
            "accelerate launch was asked for several processes and, as it finds no GPUs, has started one; add "
            "--multi_gpu, which works without GPUs too (or use torchrun --nproc_per_node N -m hf_shrink ...)"
        )


@contextmanager
def heeding_the_launcher(here: Ranks) -> Iterator[None]:
    """Let this process tidy up when the launcher ends it, as launchers do once another has failed: Ended is raised."""
    if here.size == 1 or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> NoReturn:
        raise Ended

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
