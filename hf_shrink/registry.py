"""Named methods, found by importing every file of their package: deleting a file deletes the method."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, TypeVar

from hf_shrink.errors import RecipeError

T = TypeVar("T")


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """A clause naming the nearest of `valid`, or all of them when none is near."""
    known = sorted(map(str, valid))
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"valid: {', '.join(known)}"


class Registry(Generic[T]):
    """Frozen dataclasses by name; a class's fields are the options that a recipe may set.

    Args:
        kind: how messages call the entries, for example "quantization method".
        package: dotted name of the package whose modules register entries.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self._package = package
        self._entries: dict[str, type[T]] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        def add(entry: type[T]) -> type[T]:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._entries[name] = entry
            return entry

        return add

    def names(self) -> list[str]:
        """The registered names, sorted."""
        self._load()
        return sorted(self._entries)

    def get(self, name: str) -> type[T]:
        """The class registered under `name`. Raises RecipeError naming the nearest valid one."""
        self._load()
        if name not in self._entries:
            raise RecipeError(f"unknown {self.kind} {name!r}; {did_you_mean(name, self._entries)}")
        return self._entries[name]

    def build(self, name: str, options: Mapping[str, Any], known: Iterable[str] = ()) -> T:
        """An instance with `options` as its fields. `known`: the step's own keys, for a better suggestion."""
        entry = self.get(name)
        fields = {f.name for f in dataclasses.fields(entry) if f.init}  # type: ignore[arg-type]
        for key in options:
            if key not in fields:
                hint = did_you_mean(key, fields | set(known))
                raise RecipeError(f"{self.kind} {name!r} has no option {key!r}; {hint}")
        try:
            return entry(**options)
        except (TypeError, ValueError) as error:
            raise RecipeError(f"{self.kind} {name!r}: {error}") from error

    def _load(self) -> None:
        if self._loaded:
            return
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self._package}.{module.name}")
        self._loaded = True
