"""The benchmark's results file, written again after every variant, so that a run can stop and go on at any time.

Two runs, each on cores of its own, can fill one file: what the other has written meanwhile is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FORMAT = 2


class OtherProtocol(ValueError):
    """The results file was measured differently; its figures must not stand beside new ones."""


class Store:
    """Results by variant, all of one protocol."""

    def __init__(self, path: Path, protocol: Mapping[str, Any]) -> None:
        """Take up the results in `path` where it is there.

        Raises:
            OtherProtocol: the file is of another protocol, or none of ours.
        """
        self.path = path
        self.protocol = json.loads(json.dumps(protocol))  # as it will be read again
        self._added: dict[str, dict[str, Any]] = {}
        self._dropped: set[str] = set()
        self.results = self._read()

    def _read(self) -> dict[str, dict[str, Any]]:
        """What the file holds now, by variant."""
        path = self.path
        if not path.exists():
            return {}
        try:
            content = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise OtherProtocol(f"{path} is not a results file ({error}); give another --output") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise OtherProtocol(f"{path} was not written by this version; move it away or give another --output")
        different = differences(content["protocol"], self.protocol)
        if different:
            raise OtherProtocol(
                f"{path} was measured with another protocol ({'; '.join(different)}); results are never mixed: use "
                "the same options, or give another --output"
            )
        return {result["variant"]: result for result in content["results"]}

    def add(self, result: Mapping[str, Any]) -> None:
        """Keep one variant's result in place of an earlier one, beside what the file holds by now.

        The file is only written by `write`.

        Raises:
            OtherProtocol: the result says that it ran with another number of threads.
        """
        if result["threads"] != self.protocol.get("threads", result["threads"]):
            raise OtherProtocol(
                f"{result['variant']} ran on {result['threads']} threads, not on {self.protocol['threads']}"
            )
        self._added[result["variant"]] = json.loads(json.dumps(result))
        kept = {variant: known for variant, known in self._read().items() if variant not in self._dropped}
        self.results = {**kept, **self._added}

    def drop(self, variant: str) -> None:
        """Forget a variant's result, whatever the file has, until one is added again."""
        self.results.pop(variant, None)
        self._added.pop(variant, None)
        self._dropped.add(variant)

    def write(self, summary: Mapping[str, Any]) -> Path:
        """Write everything, whole or not at all: the measured results, and `summary`, which is computed from them."""
        content = {
            "format": FORMAT,
            "protocol": self.protocol,
            "results": list(self.results.values()),
            "summary": summary,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        partial.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(partial, self.path)
        return self.path


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two protocols, as "key: old, now new"."""
    found: list[str] = []
    for key in sorted({*old, *new}):
        before, now = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            found += differences(before, now, f"{prefix}{key}.")
        elif before != now:
            found.append(f"{prefix}{key}: {before}, now {now}")
    return found


def fingerprint(*files: Path) -> str:
    """The first 16 digits of the SHA-256 of files, read in pieces. Raises FileNotFoundError where there are none."""
    if not files:
        raise FileNotFoundError("no files to take the fingerprint of")
    whole = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()[:16]
