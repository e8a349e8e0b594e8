"""Run a function in two forked processes of one group, as accelerate or torchrun would start them."""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from hf_shrink.sharding import together

Job = Callable[[int], Any]
LONGEST = 300  # seconds: who still waits for somebody then is ended


def in_two(work: Job, folder: Path) -> list[Any]:
    """What `work(rank)` gives in each of two processes. Raises RuntimeError with what they say where one fails."""
    ends = join(start(lambda rank: torch.save(work(rank), folder / f"{rank}.pt"), folder))
    if any(ends):
        raise RuntimeError("\n".join(said(folder, rank) for rank in range(2)))
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def start(work: Job, folder: Path) -> list[int]:
    """Two processes on their way, by their ids; what they write to stderr goes into `folder`. 70: `work` raised."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [_forked(work, rank, port, folder) for rank in range(2)]


def _forked(work: Job, rank: int, port: int, folder: Path) -> int:
    child = os.fork()
    if child:
        return child
    code = 70  # it must never come back into the parent's code
    signal.alarm(LONGEST)
    try:
        with (folder / f"{rank}.stderr").open("w") as file:
            sys.stderr = sys.stdout = file
            os.dup2(file.fileno(), 2)
            PartialState._reset_state()  # another test may have had one
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
            os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}
            try:
                with together():
                    found = work(rank)
                code = found if isinstance(found, int) else 0
            except BaseException:
                traceback.print_exc()
            file.flush()
    finally:
        os._exit(code)


def join(children: list[int]) -> list[int]:
    """The exit codes of processes; minus a signal's number where that ended one."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def said(folder: Path, rank: int) -> str:
    return (folder / f"{rank}.stderr").read_text()
