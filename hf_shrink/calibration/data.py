"""Calibration and evaluation data: from what the user named or passed to batches of model inputs.

`calibration_batches` is the one door. Behind it: text files and data sets (`text.py`), built-in data recipes
(`recipes.py`), images and sounds (`media.py`), data that the model makes itself (`generate.py`), and batches that the
user made (`given.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeGuard

from torch import nn

from hf_shrink.calibration.batches import CalibrationData, finish
from hf_shrink.calibration.given import given_batches, stacked
from hf_shrink.calibration.recipes import Purpose, Rows, in_order, load_recipe
from hf_shrink.calibration.request import Request
from hf_shrink.errors import CalibrationError
from hf_shrink.progress import ProgressCallback, quiet
from hf_shrink.recipe import CalibrationSpec, EvaluationSpec

__all__ = ["CalibrationData", "calibration_batches"]

FILES = (".txt", ".jsonl", ".parquet")


def calibration_batches(
    spec: CalibrationSpec | EvaluationSpec,
    *,
    source: object | None = None,
    model: nn.Module,
    tokenizer: object | None = None,
    seed: int = 0,
    exclude: Sequence[str] | None = None,
    purpose: Purpose = "calibration",
    progress: ProgressCallback | None = None,
) -> CalibrationData:
    """The batches that a spec asks for. The same arguments give the same batches, on the same machine.

    Args:
        spec: how many samples of how many tokens, in batches of how many; and which data when `source` is None.
        source: what the user passed as `calibration=`: a data recipe's name ("self", "wikitext", ...), the path of a
            .txt, .jsonl, .parquet or .yaml file, a `datasets.Dataset`, a list of texts, or an iterable of model-input
            dicts.
        model: read for what it takes as input; written text is sampled from it, in its dtype and on its device.
        tokenizer: a tokenizer, image processor, feature extractor, or a processor of several.
        exclude: texts that must not appear in the data (of the evaluation). Windows of text that share 50 characters
            with one are left out and later ones taken. What the model writes itself is not filtered.
        purpose: the data recipes and `self` give calibration and evaluation different data.
        progress: called as (what, done, total).

    Raises:
        CalibrationError: unknown, missing, empty or unreachable data, or data that the model does not read.
        RecipeError: a .yaml data recipe that is not valid.
    """
    source = spec.data if source is None else source
    if is_data_set(source):
        import datasets

        source = in_order(source, purpose, seed) if isinstance(source, datasets.Dataset) else source
    batches = _as_batches(source, model, spec)
    if batches is not None:
        kept, notes = given_batches(batches, model, spec.samples, spec.batch_size)
        return finish(kept, "batches of model inputs", {"source": "given"}, notes, spec, seed, purpose, dtype=None)
    request = Request.of(spec, model, tokenizer, seed, exclude, purpose, progress or quiet)
    if isinstance(source, str | Path):
        name = str(source)
        if Path(name).suffix in FILES:
            return request.file(Path(name))
        if Path(name).exists() and Path(name).suffix not in (".yaml", ".yml"):
            raise CalibrationError(f"{name} is not a {', '.join(FILES)} or .yaml file; rename or convert it")
        recipe = load_recipe(name)
        return request.written(recipe) if recipe.kind == "self" else request.recipe(recipe)
    if is_data_set(source):
        return request.rows(source, "a data set", ())
    assert isinstance(source, list | tuple)
    return request.text(source, "a list of texts")


def is_data_set(source: Any) -> TypeGuard[Rows]:
    """Whether it comes from the datasets library, told without importing that: it takes a second and 90 MB."""
    return type(source).__module__.partition(".")[0] == "datasets"


def _hold(rows: Rows, name: str) -> bool:
    """Whether the rows have it. Of what a transform makes, and of a stream without names, the first row says so."""
    if rows.column_names is None or getattr(rows, "format", {}).get("type") == "custom":
        return name in next(iter(rows), {})
    return name in rows.column_names


def _as_batches(
    source: object, model: nn.Module, spec: CalibrationSpec | EvaluationSpec
) -> Iterable[Mapping[str, Any]] | None:
    """The source as an iterable of model inputs when it is one; None for names, texts and data sets of raw rows."""
    if isinstance(source, str | Path):
        return None
    if is_data_set(source) and isinstance(source, dict):
        raise CalibrationError(f"pass one split of the data set, for example dataset[{next(iter(source), 'train')!r}]")
    if is_data_set(source):
        main = getattr(model, "main_input_name", "input_ids")
        # Rows that are already images as tensors; token ids are packed like text instead.
        if main == "input_ids" or not _hold(source, main):
            return None
        return stacked(islice(source, spec.samples), model, spec.batch_size)
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise CalibrationError(
            f"calibration cannot be a {type(source).__name__}; pass a name, the path of a file, a datasets.Dataset, "
            "a list of texts, or an iterable of model-input dicts"
        )
    if isinstance(source, list | tuple) and source and all(isinstance(item, str) for item in source):
        return None
    iterator = iter(source)
    first = next(iterator, None)
    if first is None:
        raise CalibrationError("the calibration data is empty; pass at least one text or one batch of model inputs")
    if not isinstance(first, Mapping):
        raise CalibrationError(
            f"calibration data must be all texts or all dicts of model inputs, but it holds a {type(first).__name__}"
        )
    return chain([first], iterator)
