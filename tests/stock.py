"""One interpreter with stock transformers for all tests of a worker: starting one costs more than most tests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

SERVER = Path(__file__).with_name("stock_server.py")


class Stock:
    """The process of stock_server.py, started when it is first needed; it never imports hf_shrink.

    Args:
        errors: file for what the process writes to stderr.
    """

    def __init__(self, errors: Path) -> None:
        self._errors = errors
        self._process: subprocess.Popen[str] | None = None

    def run(self, jobs: list[dict[str, Any]]) -> None:
        """Do the jobs, described in stock_server.py: each leaves stock.pt or stock.txt in its folder."""
        if self._process is None:
            with self._errors.open("w") as errors:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", str(SERVER)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(jobs) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer == "done\n", self._errors.read_text()[-3000:]

    def logits(self, folder: Path, kind: str, ids: list[list[int]]) -> Tensor:
        """What a model class of transformers says when it is loaded from `folder`; it has to load."""
        import torch  # conftest.py imports this file

        self.run([{"folder": str(folder), "class": kind, "ids": ids}])
        error = folder / "stock.txt"
        assert not error.is_file(), error.read_text()
        return torch.load(folder / "stock.pt")

    def called(self, folder: Path, kind: str, method: str, given: dict[str, Any]) -> Tensor:
        """What a method of the model loaded from `folder` returns, called before the model itself has run."""
        import torch

        torch.save(given, folder / "given.pt")
        self.run([{"folder": str(folder), "class": kind, "method": method, "given": str(folder / "given.pt")}])
        error = folder / "stock.txt"
        assert not error.is_file(), error.read_text()
        return torch.load(folder / "stock.pt")

    def close(self) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait(timeout=60)
