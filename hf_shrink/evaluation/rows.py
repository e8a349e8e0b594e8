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
from hf_shrink.evaluation.image_folders import images_by_class
from hf_shrink.evaluation.recipes import TaskRecipe
from hf_shrink.evaluation.tasks import Row, Task
from hf_shrink.evaluation.tasks.cells import Place, cell_of, shown
from hf_shrink.registry import did_you_mean

ROW_FILES = (".jsonl", ".parquet", ".csv")
_MEDIA = ("image", "audio")


@dataclass(frozen=True)
class Table:
    """Rows as they came.

    Attributes:
        rows: in order, each by column name; may be read only once.
        columns: their names, of all rows where these are at hand.
        names: of columns of classes, the classes' names.
        description: in words.
        folder: where paths in the rows start from.
        cells: whether all is text, as in a CSV file, so that lists are there as JSON.
    """

    rows: Iterable[Mapping[str, Any]]
    columns: tuple[str, ...]
    names: Mapping[str, Sequence[str]]
    description: str
    folder: Path | None = None
    cells: bool = False

    def of_task(self, task: Task, wanted: Mapping[str, str], samples: int | None, model: Any) -> list[Row]:
        """The first `samples` rows (None: all) by role.

        Args:
            wanted: columns by role; where the rows have no such column the usual names are tried.
            model: says what its classes are called.

        Raises:
            CalibrationError: a column is missing, or a row has nothing in one.
        """
        columns = columns_of(task, self.columns, wanted)
        missing = [role for role in task.needs(model) if role not in columns]
        if missing:
            usual = ", ".join(task.roles[missing[0]])
            raise CalibrationError(
                f"{self.description} has no column for {missing[0]!r} among {', '.join(self.columns) or 'none'}; call "
                f"it one of {usual}, or name it under `columns` in a recipe"
            )
        return [self._row(row, columns, task, model) for row in islice(self.rows, samples)]

    def _row(self, row: Mapping[str, Any], columns: Mapping[str, str], task: Task, model: Any) -> Row:
        found = {role: row.get(column) for role, column in columns.items()}
        for role in task.needs(model):
            if found[role] is None:
                raise CalibrationError(
                    f"{self.description} has nothing in the column {columns[role]!r} of the row with {shown(row)}; "
                    "fill it, or leave the row out"
                )
        for role, column in columns.items():
            value = found[role]
            if self.cells and role in task.lists and isinstance(value, str):
                found[role] = cell_of(value, role)
            elif role in _MEDIA and isinstance(value, str) and self.folder is not None:
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
        return _table(_mixed(rows, seed), path.name, features, path.parent, cells=path.suffix == ".csv")
    return _table(list(source), "given rows", None)


def _table(
    rows: Iterable[Mapping[str, Any]], name: str, features: Any, folder: Path | None = None, *, cells: bool = False
) -> Table:
    iterator = iter(rows)
    first = next(iterator, None)
    if first is None:
        raise CalibrationError(f"{name} has no rows")
    names = {column: found for column, feature in (features or {}).items() if (found := _class_names(feature))}
    # Rows of a data set all have the same columns; those of a list need not.
    columns = tuple(dict.fromkeys(column for row in rows for column in row)) if isinstance(rows, list) else tuple(first)
    return Table(_chained(first, iterator), columns, names, name, folder, cells)


def _chained(first: Mapping[str, Any], rest: Iterator[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    yield first
    yield from rest


def _file(path: Path) -> Iterable[Mapping[str, Any]]:
    if not path.is_file():
        raise CalibrationError(f"there is no file {path}")
    if path.suffix == ".jsonl":
        return read_lines(path)
    if path.suffix == ".csv":
        return _csv_rows(path)
    if path.suffix == ".parquet":
        rows: Iterable[Mapping[str, Any]] = from_parquet(path)
        return rows
    raise CalibrationError(f"{path} is not a {', '.join(ROW_FILES)} file; rows with right answers come in those")


def _csv_rows(path: Path) -> list[Mapping[str, Any]]:
    """An empty cell is nothing, as `datasets` reads it: CSV has no other way to say that."""
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(path), newline="")))
    except csv.Error as error:
        raise CalibrationError(f"{path} is not CSV that can be read: {error}") from error
    for row in rows:
        if None in row:
            raise CalibrationError(
                f"{path} has more cells than columns in the row with {shown(row)}; put cells with commas in quotes"
            )
    return [{column: cell or None for column, cell in row.items()} for row in rows]


def _folder(path: Path, seed: int) -> Table:
    """A folder with a folder of images for each class."""
    images = images_by_class(path)
    # Places of classes that are called by numbers would be those of the texts: 0, 1, 10, 2.
    numbers = all(map(str.isdecimal, images))
    rows = [
        {"image": image, "label": name if numbers else place}
        for place, (name, found) in enumerate(images.items())
        for image in found
    ]
    return Table(_mixed(rows, seed), ("image", "label"), {} if numbers else {"label": [*images]}, path.name)


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
    """Classes by their names where the model knows all of these; else by their places, as both count."""
    known = {str(name).lower() for name in (getattr(model.config, "label2id", None) or {})}
    by_name = all(str(name).lower() in known for name in names)

    def one(place: Any) -> Any:
        if not isinstance(place, int) or not 0 <= place < len(names):  # of no class: -1, say
            return place
        return names[place] if by_name else Place(place)

    return [one(place) for place in value] if isinstance(value, list) else one(value)
