"""Built-in data recipes: small YAML files that say which data set to load and how to read it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import yaml

from hf_shrink.errors import CalibrationError, RecipeError
from hf_shrink.paths import check_name
from hf_shrink.registry import did_you_mean
from hf_shrink.reporting.progress import silence_datasets
from hf_shrink.resources import recipes_folder

if TYPE_CHECKING:
    import datasets

Kind = Literal["self", "text", "chat", "image", "audio"]
Purpose = Literal["calibration", "evaluation"]

# Documents at the start of a stream that are for calibration when the data set has no split for evaluation.
_STREAM_SHARE = 5000
_SHUFFLE_BUFFER = 1000

Rows: TypeAlias = "datasets.Dataset | datasets.IterableDataset"


@dataclass(frozen=True)
class DataRecipe:
    """One data recipe.

    Attributes:
        name: how `--calibration` calls it.
        kind: what the rows hold; "self" means sampled from the model, without a data set.
        description: one line for `hf-shrink recipes`.
        dataset, config: what `datasets.load_dataset` gets: a Hub id or a local folder, and its configuration.
        split, evaluation_split: which split calibrates and which evaluates. Without the latter, evaluation takes rows
            that calibration does not.
        columns: which columns hold the text, chat, image or audio. Empty: the usual names.
        join: put between the rows when they are the lines of one text; null when each row is a document.
        streaming: read only what is needed instead of downloading the whole data set.
        temperature, chat_share: for "self", see `generate.py`.
    """

    name: str
    kind: Kind
    description: str = ""
    dataset: str | None = None
    config: str | None = None
    split: str = "train"
    evaluation_split: str | None = None
    columns: tuple[str, ...] = ()
    join: str | None = None
    streaming: bool = False
    temperature: float = 1.0
    chat_share: float = 0.5

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            hint = did_you_mean(str(self.kind), get_args(Kind))
            raise RecipeError(f"data recipe {self.name}: kind {self.kind!r} is unknown; {hint}")
        if self.kind != "self" and not self.dataset:
            raise RecipeError(f"data recipe {self.name} needs `dataset`: a Hub id or the path of a folder")
        if isinstance(self.columns, str) or not all(isinstance(c, str) for c in self.columns):
            raise RecipeError(f"data recipe {self.name}: columns is a list of names, for example [text]")
        object.__setattr__(self, "columns", tuple(self.columns))
        if not (isinstance(self.temperature, int | float) and self.temperature > 0):
            raise RecipeError(f"data recipe {self.name}: temperature must be above 0, not {self.temperature!r}")
        if not (isinstance(self.chat_share, int | float) and 0 <= self.chat_share <= 1):
            raise RecipeError(f"data recipe {self.name}: chat_share must be between 0 and 1, not {self.chat_share!r}")


def recipe_names() -> list[str]:
    """The names of the built-in data recipes, sorted."""
    return sorted(path.stem for path in recipes_folder("calibration").glob("*.yaml"))


def check_data_name(name: str | Path) -> None:
    """Raises CalibrationError where the data itself, as text, stands in the place of its name."""
    check_name(name, "pass a list of texts, or write it into a .txt file and pass its path", CalibrationError)


def load_recipe(name: str) -> DataRecipe:
    """A built-in data recipe by name, or one of your own by the path of its .yaml file.

    Raises CalibrationError for an unknown name, RecipeError for a file that is not a valid data recipe.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        known = recipe_names()
        if name not in known:
            raise CalibrationError(
                f"unknown data {name!r}; {did_you_mean(name, known)} "
                "(or give the path of a .txt, .jsonl, .parquet or .yaml file, or a list of texts)"
            )
        path = recipes_folder("calibration") / f"{name}.yaml"
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"cannot read data recipe {path}: {error}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"data recipe {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, Mapping) or "kind" not in data:
        raise RecipeError(f"data recipe {path} must be a mapping with a `kind`")
    valid = [f.name for f in fields(DataRecipe) if f.name != "name"]
    for key in data:
        if key not in valid:
            raise RecipeError(f"data recipe {path}: unknown key {key!r}; {did_you_mean(str(key), valid)}")
    return DataRecipe(name=path.stem, **data)


def data_files(name: str) -> list[Path]:
    """The files here that the data of that name is read from, sorted: itself, and what a data recipe reads.

    None where the data is the Hub's, the model's own, or not there. Raises as `load_recipe` of one's own data recipe.
    """
    check_data_name(name)
    path = Path(name)
    files = [path] if path.is_file() else []
    if name in recipe_names() or (files and path.suffix in (".yaml", ".yml")):
        dataset = load_recipe(name).dataset
        places = [] if dataset is None else [Path(dataset), *Path(dataset).rglob("*")]
        files += sorted(place for place in places if place.is_file())
    return files


def load_rows(recipe: DataRecipe, purpose: Purpose, seed: int) -> Rows:
    """The data set's rows in the order to use them: shuffled by `seed`, unless they are the lines of one text.

    Calibration and evaluation never get the same rows, as long as there are enough for both.
    Raises CalibrationError when the data set cannot be reached or lacks the split.
    """
    import datasets

    split = recipe.evaluation_split if purpose == "evaluation" and recipe.evaluation_split else recipe.split
    try:
        with silence_datasets():
            rows = datasets.load_dataset(recipe.dataset, recipe.config, split=split, streaming=recipe.streaming)
    except _loading_errors() as error:
        raise _unreachable(recipe, error) from error
    own_split = recipe.evaluation_split is not None
    if isinstance(rows, datasets.Dataset):
        return rows if recipe.join is not None else in_order(rows, purpose, seed, own_split=own_split)
    if not own_split:
        rows = rows.take(_STREAM_SHARE) if purpose == "calibration" else rows.skip(_STREAM_SHARE)
    return rows if recipe.join is not None else rows.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)


def from_parquet(path: Path) -> datasets.Dataset:
    """The rows of a .parquet file. Raises CalibrationError when it cannot be read."""
    import datasets

    try:
        with silence_datasets():
            table = datasets.Dataset.from_parquet(str(path))
    except _loading_errors() as error:
        raise CalibrationError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    assert isinstance(table, datasets.Dataset)
    return table


def in_order(rows: datasets.Dataset, purpose: Purpose, seed: int, *, own_split: bool = False) -> datasets.Dataset:
    """Rows shuffled by `seed`; evaluation reads the same order from its end, so that the two do not meet."""
    shuffled = rows.shuffle(seed=seed)
    if purpose == "evaluation" and not own_split:
        shuffled = shuffled.select(range(len(shuffled) - 1, -1, -1))
    return shuffled


def positions(count: int, purpose: Purpose, seed: int) -> list[int]:
    """The order of `in_order` for rows that need not fit one table, such as those of a .jsonl file."""
    import datasets

    rows = in_order(datasets.Dataset.from_dict({"row": list(range(count))}), purpose, seed)
    return [int(row) for row in rows["row"]]


def iterate(rows: Rows, recipe: DataRecipe) -> Iterator[Mapping[str, Any]]:
    """The rows one by one; a stream that breaks off raises CalibrationError."""
    iterator = iter(rows)
    while True:
        try:
            row = next(iterator)
        except StopIteration:
            return
        except _loading_errors() as error:
            raise _unreachable(recipe, error) from error
        yield row


def peeked(rows: Iterable[Mapping[str, Any]]) -> tuple[Mapping[str, Any], Iterator[Mapping[str, Any]]]:
    """The first row, which is {} where there is none, and all rows."""
    iterator = iter(rows)
    first = next(iterator, None)
    return ({}, iterator) if first is None else (first, chain([first], iterator))


def _loading_errors() -> tuple[type[Exception], ...]:
    """What load_dataset raises when offline, gated, misspelt, without the split, or made of a script."""
    from datasets.exceptions import DatasetsError

    return (OSError, ValueError, RuntimeError, ImportError, DatasetsError)


def _unreachable(recipe: DataRecipe, error: Exception) -> CalibrationError:
    said = (" ".join(str(part).split()) or type(part).__name__ for part in (error, error.__cause__) if part is not None)
    reason = ": ".join(part[:300].rstrip(".") for part in said)
    place = Path(str(recipe.dataset))
    if place.exists():
        remedy = f"Check the files in {place}, and what is to be installed to read them"
    else:
        remedy = (
            "Without network access use --calibration self or the path of a .txt, .jsonl or .parquet file, or fill the "
            "Hugging Face cache (HF_HOME) on a machine that has it"
        )
    return CalibrationError(f"cannot load data {recipe.name!r} ({recipe.dataset}): {reason}. {remedy}")
