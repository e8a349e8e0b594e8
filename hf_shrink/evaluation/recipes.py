"""From what a user writes after `--evaluation`, `--data` or `--recipe` to what is measured, and on what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from hf_shrink.errors import RecipeError
from hf_shrink.evaluation.metrics import check_names
from hf_shrink.evaluation.tasks import TASKS
from hf_shrink.recipe import EvaluationSpec
from hf_shrink.registry import did_you_mean
from hf_shrink.resources import recipes_folder

DATA_FILES = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True)
class TaskRecipe:
    """A task with right answers, and the rows to ask.

    Attributes:
        name: of the recipe.
        task: one of `TASKS`.
        dataset, config, split: what `datasets.load_dataset` gets: a Hub id or a local folder.
        columns: the column of each role where it is not called as usual; on other rows that lack it the usual names
            are tried.
        metrics: by name; None: all that read what the task gives and cost nothing more.
        samples: how many rows; None: all.
        length: tokens of an input at most.
        batch_size: rows at once.
        options: the fields of the task's own dataclass.
    """

    name: str
    task: str
    dataset: str | None = None
    config: str | None = None
    split: str = "validation"
    columns: Mapping[str, str] = field(default_factory=dict)
    metrics: tuple[str, ...] | None = None
    samples: int | None = 200
    length: int = 512
    batch_size: int = 8
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in ("samples", "length", "batch_size"):
            value = getattr(self, key)
            if (value is not None or key != "samples") and not (isinstance(value, int) and value >= 1):
                raise RecipeError(f"{key} of {self.name} must be a whole number of at least 1, not {value!r}")
        for key in ("columns", "options"):
            if not isinstance(getattr(self, key), Mapping):
                raise RecipeError(f"{key} of {self.name} must be a mapping, not {getattr(self, key)!r}")
        if self.metrics is not None:
            object.__setattr__(self, "metrics", tuple(self.metrics))
            check_names(self.metrics)


def recipe_names() -> list[str]:
    """The built-in evaluation recipes, sorted."""
    return sorted(path.stem for path in recipes_folder("evaluation").glob("*.yaml"))


def evaluation_spec(text: str | Path) -> EvaluationSpec | TaskRecipe:
    """The settings that a string stands for.

    The name of a built-in evaluation recipe, or the path of a .yaml file like one: what it says. A recipe with a `task`
    is about right answers, any other about predicting text. The path of a data file: the `text-file` recipe on that
    file. Anything else is the name of a data recipe, with the default settings.

    Raises:
        RecipeError: the file cannot be read or is not an evaluation recipe.
    """
    name, path = str(text), Path(text)
    if path.suffix in DATA_FILES:
        return text_file(name)
    if name in recipe_names():
        return _read(recipes_folder("evaluation") / f"{name}.yaml")
    if path.suffix in (".yaml", ".yml"):
        content = _load(path)
        # A file with a `kind` is a data recipe: which data, and not what to measure on it.
        return EvaluationSpec(data=name) if "kind" in content else _spec(content, path)
    return EvaluationSpec(data=name)


def text_file(name: str) -> EvaluationSpec:
    """The settings for running text in a file."""
    spec = _read(recipes_folder("evaluation") / "text-file.yaml")
    assert isinstance(spec, EvaluationSpec)
    return replace(spec, data=name)


def _read(path: Path) -> EvaluationSpec | TaskRecipe:
    return _spec(_load(path), path)


def _load(path: Path) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"cannot read evaluation recipe {path}: {' '.join(str(error).split())}") from error
    if not isinstance(content, Mapping):
        raise RecipeError(f"evaluation recipe {path} must be a mapping such as {{data: self, samples: 16}}")
    return content


def _spec(content: Mapping[str, Any], path: Path) -> EvaluationSpec | TaskRecipe:
    task = "task" in content
    valid = [f.name for f in fields(TaskRecipe if task else EvaluationSpec) if f.name != "name" or not task]
    for key in content:
        if key not in valid:
            raise RecipeError(f"evaluation recipe {path}: unknown key {key!r}; {did_you_mean(str(key), valid)}")
    if not task:
        return EvaluationSpec(**content)
    recipe = TaskRecipe(path.stem, **content)
    TASKS.build(recipe.task, recipe.options)
    return recipe
