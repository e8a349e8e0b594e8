"""What a source is, so that a run that goes on can tell whether it is still the same."""

from __future__ import annotations

import hashlib
from pathlib import Path

from transformers.utils import CONFIG_NAME

from hf_shrink.checkpoint.folder import SIDE_FILES
from hf_shrink.checkpoint.shards import find_shards
from hf_shrink.checkpoint.source import Source


def fingerprint(source: Source) -> dict[str, str]:
    """SHA-256 of every file of a source that decides a result, by name. Its weights must be here."""
    shards = source.shards or find_shards(source.name, source.folder)
    others = [path for name in (CONFIG_NAME, *SIDE_FILES) if (path := source.folder / name).is_file()]
    return {path.name: digest(path) for path in (*shards, *others)}


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
