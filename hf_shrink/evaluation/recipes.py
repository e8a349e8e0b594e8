"""From what a user writes after `--evaluation` or `--data` to an EvaluationSpec."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import yaml

from hf_shrink.errors import RecipeError
from hf_shrink.recipe import EvaluationSpec
from hf_shrink.registry import did_you_mean
from hf_shrink.resources import recipes_folder

DATA_FILES = (".txt", ".jsonl", ".parquet")


def recipe_names() -> list[str]:
    """The built-in evaluation recipes, sorted."""
    return sorted(path.stem for path in recipes_folder("evaluation").glob("*.yaml"))


def evaluation_spec(text: str | Path) -> EvaluationSpec:
    """The settings that a string stands for.

    The name of a built-in evaluation recipe, or the path of a .yaml file like one: what it says. The path of a data
    file: the `text-file` recipe on that file. Anything else is the name of a data recipe, with the default settings.

    Raises:
        RecipeError: the file cannot be read or is not an evaluation recipe.
    """
    name, path = str(text), Path(text)
    if path.suffix in DATA_FILES:
        return replace(_read(recipes_folder("evaluation") / "text-file.yaml"), data=name)
    if name in recipe_names():
        return _read(recipes_folder("evaluation") / f"{name}.yaml")
    if path.suffix in (".yaml", ".yml"):
        content = _load(path)
        # A file with a `kind` is a data recipe: which data, and not what to measure on it.
        return EvaluationSpec(data=name) if "kind" in content else _spec(content, path)
    return EvaluationSpec(data=name)


def _read(path: Path) -> EvaluationSpec:
    return _spec(_load(path), path)


def _load(path: Path) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"cannot read evaluation recipe {path}: {' '.join(str(error).split())}") from error
    if not isinstance(content, Mapping):
        raise RecipeError(f"evaluation recipe {path} must be a mapping such as {{data: self, samples: 16}}")
    return content


def _spec(content: Mapping[str, Any], path: Path) -> EvaluationSpec:
    valid = [field.name for field in fields(EvaluationSpec)]
    for key in content:
        if key not in valid:
            raise RecipeError(f"evaluation recipe {path}: unknown key {key!r}; {did_you_mean(str(key), valid)}")
    return EvaluationSpec(**content)
