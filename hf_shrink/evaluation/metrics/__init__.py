"""Metrics as `evaluate` modules, one a file, each loaded from its own file: nothing is looked up on the Hub.

A metric says in its file which columns it reads, so that deleting the file deletes the metric. Those of language models
take one number a sequence and how many positions it sums over: a run over millions of tokens keeps a few bytes a
sequence.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any
from uuid import uuid4

from hf_shrink.errors import RecipeError, ShrinkError
from hf_shrink.registry import did_you_mean
from hf_shrink.resources import metric_names

NAMES = metric_names()


class MissingPackage(ShrinkError):
    """A metric is built on a package that is not installed."""


def check_names(names: Iterable[str]) -> None:
    """Raises RecipeError for a name that is no metric's; names the nearest."""
    for name in names:
        if name not in NAMES:
            raise RecipeError(f"unknown metric {name!r}; {did_you_mean(name, NAMES)}")


def metric_path(name: str) -> Path:
    """The file of a metric: as a str what `evaluate.load` and `evaluate.combine` take. Raises RecipeError."""
    check_names([name])
    return Path(__file__).parent / f"{name}.py"


def load_metric(name: str, cache_dir: str | Path) -> Any:
    """The metric of that name, a `hf_shrink.evaluation.modules.Module`, from its file in this folder.

    Args:
        name: one of `NAMES`.
        cache_dir: a temporary folder of the caller's; the totals themselves stay in memory, so that two runs at once
            share no file.

    Raises:
        RecipeError: there is no such metric; names the nearest.
        MissingPackage: install hf_shrink[evaluation].
        ShrinkError: the Hugging Face cache cannot be written.
    """
    path = metric_path(name)
    import evaluate  # takes seconds to import, so not before it is needed

    try:
        return evaluate.load(str(path), keep_in_memory=True, cache_dir=str(cache_dir), experiment_id=uuid4().hex)
    except ImportError as error:
        raise MissingPackage(
            f"metric {name!r} cannot be loaded: {' '.join(str(error).split())}; pip install hf_shrink[evaluation]"
        ) from error
    except OSError as error:  # evaluate imports a copy that it keeps in the Hugging Face cache
        raise ShrinkError(
            f"metric {name!r} cannot be loaded: {error}; point HF_HOME or HF_MODULES_CACHE at a folder that can be "
            "written"
        ) from error
