"""Calibration and evaluation data: from what the user named or passed to batches of model inputs.

`calibration_batches` is the one door. Behind it: text files and data sets (`text.py`), built-in data recipes
(`recipes.py`), images and sounds (`media.py`), data that the model makes itself (`generate.py`), and batches that the
user made (`given.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeGuard

from torch import nn

from hf_shrink.calibration.batches import CalibrationData, finish
from hf_shrink.calibration.given import given_batches, stacked
from hf_shrink.calibration.recipes import Purpose, Rows, check_data_name, in_order, load_recipe
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
            .txt, .jsonl, .parquet or .yaml file, a `datasets.Dataset`, an iterable of texts (a list, a column of a
            data set, ...), or one of model-input dicts.
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
    texts, batches = _given(source, model, spec)
    if batches is not None:
        kept, notes = given_batches(batches, model, spec.samples, spec.batch_size)
        return finish(kept, "batches of model inputs", {"source": "given"}, notes, spec, seed, purpose, dtype=None)
    request = Request.of(spec, model, tokenizer, seed, exclude, purpose, progress or quiet)
    if texts is not None:
        return request.text(texts, "a list of texts")
    if is_data_set(source):
        return request.rows(source, "a data set", ())
    name = str(source)
    check_data_name(name)
    if Path(name).suffix in FILES:
        return request.file(Path(name))
    if Path(name).is_dir():
        raise CalibrationError(
            f"{name} is a folder; to read the files in it, give a data recipe, a .yaml file with `dataset: {name}` and "
            "`kind: image`, audio, text or chat"
        )
    if Path(name).exists() and Path(name).suffix not in (".yaml", ".yml"):
        raise CalibrationError(f"{name} is not a {', '.join(FILES)} or .yaml file; rename or convert it")
    recipe = load_recipe(name)
    return request.written(recipe) if recipe.kind == "self" else request.recipe(recipe)


def is_data_set(source: Any) -> TypeGuard[Rows]:
    """Whether it comes from the datasets library, told without importing that: it takes a second and 90 MB.

    One column of a data set, which that library gives too, is none.
    """
    return type(source).__module__.partition(".")[0] == "datasets" and hasattr(source, "column_names")


def _hold(rows: Rows, name: str) -> bool:
    """Whether the rows have it. Of what a transform makes, and of a stream without names, the first row says so."""
    if rows.column_names is None or getattr(rows, "format", {}).get("type") == "custom":
        return name in next(iter(rows), {})
    return name in rows.column_names


def _given(
    source: object, model: nn.Module, spec: CalibrationSpec | EvaluationSpec
) -> tuple[Iterable[str] | None, Iterable[Mapping[str, Any]] | None]:
    """The source as texts or as model inputs, where it is either; neither for names and data sets of raw rows."""
    if isinstance(source, str | Path):
        return None, None
    if is_data_set(source):
        return None, _stacked_rows(source, model, spec)
    # A table gives the names of its columns when it is iterated over.
    if isinstance(source, Mapping) or hasattr(source, "columns") or not isinstance(source, Iterable):
        raise CalibrationError(
            f"calibration cannot be a {type(source).__name__}; pass a name, the path of a file, a datasets.Dataset, "
            "a list of texts, or an iterable of model-input dicts"
        )
    iterator = iter(source)
    try:
        first = next(iterator)
    except StopIteration:
        raise CalibrationError(
            "the calibration data is empty; pass at least one text or one batch of model inputs"
        ) from None
    everything = chain([first], iterator)
    if isinstance(first, str):
        return _texts(everything), None
    if isinstance(first, Mapping):
        return None, everything
    raise CalibrationError(
        f"calibration data must be all texts or all dicts of model inputs, but it holds a {type(first).__name__}"
    )


def _texts(items: Iterable[Any]) -> Iterator[str]:
    """The items as they are read, which may be endless. Raises CalibrationError at one that is no text."""
    for number, item in enumerate(items):
        if not isinstance(item, str):
            raise CalibrationError(
                "calibration data must be all texts or all dicts of model inputs, but element "
                f"{number} is a {type(item).__name__} among texts"
            )
        yield item


def _stacked_rows(
    rows: Rows, model: nn.Module, spec: CalibrationSpec | EvaluationSpec
) -> Iterable[Mapping[str, Any]] | None:
    """Rows that are already images or sounds as tensors, in batches; None for other rows.

    Token ids are none of these: they are packed like text.
    """
    if isinstance(rows, dict):
        raise CalibrationError(f"pass one split of the data set, for example dataset[{next(iter(rows), 'train')!r}]")
    main = getattr(model, "main_input_name", "input_ids")
    if main == "input_ids" or not _hold(rows, main):
        return None
    return stacked(islice(rows, spec.samples), model, spec.batch_size)
