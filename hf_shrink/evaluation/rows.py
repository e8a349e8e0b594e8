"""Rows with right answers: from a data set, a file of the user's, or given ones, by what their columns are for."""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from hf_shrink.calibration.data import is_data_set
from hf_shrink.calibration.recipes import DataRecipe, from_parquet, iterate, load_rows
from hf_shrink.calibration.text import read_lines, read_text
from hf_shrink.errors import CalibrationError
from hf_shrink.evaluation.recipes import TaskRecipe
from hf_shrink.evaluation.tasks import Row, Task
from hf_shrink.registry import did_you_mean
from hf_shrink.reporting.progress import silence_datasets

ROW_FILES = (".jsonl", ".parquet", ".csv")
_MEDIA = ("image", "audio")


@dataclass(frozen=True)
class Table:
    """Rows as they came.

    Attributes:
        rows: in order, each by column name; may be read only once.
        columns: their names, of the first row.
        names: of columns of classes, the classes' names.
        description: in words.
        folder: where paths in the rows start from.
    """

    rows: Iterable[Mapping[str, Any]]
    columns: tuple[str, ...]
    names: Mapping[str, Sequence[str]]
    description: str
    folder: Path | None = None

    def of_task(self, task: Task, wanted: Mapping[str, str], samples: int | None, model: Any) -> list[Row]:
        """The first `samples` rows (None: all) by role.

        Args:
            wanted: columns by role; where the rows have no such column the usual names are tried.
            model: says what its classes are called.

        Raises:
            CalibrationError: a column is missing, or there are no rows.
        """
        columns = columns_of(task, self.columns, wanted)
        missing = [role for role in task.roles if role not in columns and role not in task.optional]
        if missing:
            usual = ", ".join(task.roles[missing[0]])
            raise CalibrationError(
                f"{self.description} has no column for {missing[0]!r} among {', '.join(self.columns) or 'none'}; call "
                f"it one of {usual}, or name it under `columns` in a recipe"
            )
        return [self._row(row, columns, model) for row in islice(self.rows, samples)]

    def _row(self, row: Mapping[str, Any], columns: Mapping[str, str], model: Any) -> Row:
        found = {role: row.get(column) for role, column in columns.items()}
        for role, column in columns.items():
            value = found[role]
            if role in _MEDIA and isinstance(value, str) and self.folder is not None:
                found[role] = self.folder / value
            elif column in self.names:
                found[role] = _named(value, self.names[column], model)
        return found


def columns_of(task: Task, available: Sequence[str], wanted: Mapping[str, str]) -> dict[str, str]:
    """The column of each role, where there is one. Raises CalibrationError for a role that the task does not know."""
    for role in wanted:
        if role not in task.roles:
            raise CalibrationError(f"the task has no {role!r} column; {did_you_mean(role, task.roles)}")
    whole = (found for found in task.together if set(found.values()) <= set(available))
    named = any(wanted[role] in available for role in wanted)
    found: dict[str, str] = {} if named else dict(next(whole, {}))
    for role, usual in task.roles.items():
        names = (*([wanted[role]] if role in wanted else []), *usual)
        if role in found:
            continue
        column = next((name for name in names if name in available and name not in found.values()), None)
        if column is not None:
            found[role] = column
    return found


def table_of(source: Any, recipe: TaskRecipe, seed: int) -> Table:
    """The rows of a recipe's data set, of a file or folder, of a `datasets.Dataset` or of a list of mappings.

    Raises:
        CalibrationError: unknown, unreachable, empty or unreadable data.
    """
    if source is None:
        data = DataRecipe(
            recipe.name,
            "text",
            dataset=recipe.dataset,
            config=recipe.config,
            split=recipe.split,
            evaluation_split=recipe.split,
        )
        rows = _undecoded(load_rows(data, "evaluation", seed))
        return _table(iterate(rows, data), f"{recipe.dataset} ({recipe.split})", getattr(rows, "features", None))
    if is_data_set(source):
        return _table(_undecoded(source), "a data set", getattr(source, "features", None))
    if isinstance(source, str | Path):
        path = Path(source)
        if path.is_dir():
            return _folder(path, seed)
        rows = _file(path)
        features = getattr(rows, "features", None)
        return _table(_mixed(rows, seed), path.name, features, path.parent)
    return _table(list(source), "given rows", None)


def _table(rows: Iterable[Mapping[str, Any]], name: str, features: Any, folder: Path | None = None) -> Table:
    iterator = iter(rows)
    first = next(iterator, None)
    if first is None:
        raise CalibrationError(f"{name} has no rows")
    names = {column: found for column, feature in (features or {}).items() if (found := _class_names(feature))}
    return Table(_chained(first, iterator), tuple(first), names, name, folder)


def _chained(first: Mapping[str, Any], rest: Iterator[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    yield first
    yield from rest


def _file(path: Path) -> Iterable[Mapping[str, Any]]:
    if not path.is_file():
        raise CalibrationError(f"there is no file {path}")
    if path.suffix == ".jsonl":
        return read_lines(path)
    if path.suffix == ".csv":
        try:
            return list(csv.DictReader(io.StringIO(read_text(path), newline="")))
        except csv.Error as error:
            raise CalibrationError(f"{path} is not CSV that can be read: {error}") from error
    if path.suffix == ".parquet":
        rows: Iterable[Mapping[str, Any]] = from_parquet(path)
        return rows
    raise CalibrationError(f"{path} is not a {', '.join(ROW_FILES)} file; rows with right answers come in those")


def _folder(path: Path, seed: int) -> Table:
    """A folder with a folder of images for each class, as `datasets` reads it."""
    import datasets

    with silence_datasets():
        try:
            rows = datasets.load_dataset("imagefolder", data_dir=str(path), split="train", cache_dir=None)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise CalibrationError(
                f"{path} is not a folder with a folder of images for each class: {' '.join(str(error).split())[:300]}"
            ) from error
    return _table(_mixed(rows, seed), path.name, rows.features)


def _mixed(rows: Any, seed: int) -> Iterable[Mapping[str, Any]]:
    """In another order, the same every time: files are often sorted by class."""
    if is_data_set(rows):
        mixed: Iterable[Mapping[str, Any]] = _undecoded(rows).shuffle(seed=seed)
        return mixed
    in_order: list[Mapping[str, Any]] = rows
    return random.Random(seed).sample(in_order, len(in_order))


def _undecoded(rows: Any) -> Any:
    """A data set with its images as they are stored: a task holds all rows, and decodes the images that it looks at."""
    import datasets

    if isinstance(rows, datasets.Dataset) and rows.format["type"] is not None:
        return rows  # in a format that the user chose
    for name, feature in (getattr(rows, "features", None) or {}).items():
        if isinstance(feature, datasets.Image) and feature.decode and feature.mode is None:
            rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows


def _class_names(feature: Any) -> Sequence[str] | None:
    """The names of a column's classes; of a column of lists those of its entries."""
    inner = getattr(feature, "feature", feature)
    names: Sequence[str] | None = getattr(inner, "names", None)
    return names


def _named(value: Any, names: Sequence[str], model: Any) -> Any:
    """A class by its name where the model knows that; else its number, as both count."""
    known = {str(name).lower() for name in (getattr(model.config, "label2id", None) or {})}
    if not all(str(name).lower() in known for name in names):
        return value
    if isinstance(value, list):
        return [names[one] for one in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value
