"""Metrics as `evaluate.Metric` modules, each loaded from its own file: nothing is looked up on the Hub.

All four take one number a sequence and how many positions it sums over, so that a run over millions of tokens
keeps a few bytes a sequence.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import uuid4

from hf_shrink.errors import RecipeError, ShrinkError
from hf_shrink.registry import did_you_mean

NAMES = tuple(sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py")))


def load_metric(name: str, cache_dir: str | Path) -> Any:
    """The `evaluate.Metric` of that name, from its file in this folder.

    Args:
        name: one of `NAMES`.
        cache_dir: a temporary folder of the caller's; the totals themselves stay in memory, so that two runs at once
            share no file.

    Raises:
        RecipeError: there is no such metric; names the nearest.
        ShrinkError: the Hugging Face cache cannot be written.
    """
    if name not in NAMES:
        raise RecipeError(f"unknown metric {name!r}; {did_you_mean(name, NAMES)}")
    import evaluate  # takes seconds to import, so not before it is needed

    path = Path(__file__).parent / f"{name}.py"
    try:
        return evaluate.load(str(path), keep_in_memory=True, cache_dir=str(cache_dir), experiment_id=uuid4().hex)
    except OSError as error:  # evaluate imports a copy that it keeps in the Hugging Face cache
        raise ShrinkError(
            f"metric {name!r} cannot be loaded: {error}; point HF_HOME or HF_MODULES_CACHE at a folder that can be "
            "written"
        ) from error
