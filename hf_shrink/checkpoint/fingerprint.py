"""What a source is, so that a run that goes on can tell whether it is still the same."""

from __future__ import annotations

import hashlib
from pathlib import Path

from transformers.utils import CONFIG_NAME

from hf_shrink.checkpoint.shards import find_shards
from hf_shrink.checkpoint.side_files import side_files
from hf_shrink.checkpoint.source import Source


def fingerprint(source: Source) -> dict[str, str]:
    """SHA-256 of every file of a source that decides a result or is copied, by name. Its weights must be here.

    Of a Hub id what is copied at the end is fetched now, so that a run that goes on finds the same files.
    """
    shards = source.shards or find_shards(source.name, source.folder)
    files = [*((shard.name, shard) for shard in shards), (CONFIG_NAME, source.folder / CONFIG_NAME)]
    return {name: digest(path) for name, path in (*files, *side_files(source))}


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
