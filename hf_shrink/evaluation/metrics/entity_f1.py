"""F1 of entities in tagged words."""

from __future__ import annotations

from typing import Any

import datasets

from hf_shrink.evaluation import modules
from hf_shrink.evaluation.bootstrap import Interval, ratio_interval

Entity = tuple[str, int, int]


class EntityF1(modules.Module):
    """2 right / (found + wanted) over all entities; one is right when its type, first and last word are (as CoNLL's).

    Tags are BIO or plain types; a plain type and an I- that follows no entity of its type begin one.
    """

    reads = ("tags", "reference_tags")
    inputs = ("a list of tags each", "the right tags")
    paper = "Tjong Kim Sang and De Meulder, CoNLL-2003"

    @classmethod
    def columns(cls) -> list[dict[str, Any]]:
        tags = datasets.Sequence(datasets.Value("string"))
        return [{"predictions": tags, "references": tags}]

    def interval(self, predictions: list[list[str]], references: list[list[str]], seed: int) -> Interval:
        found, wanted = [*map(_entities, predictions)], [*map(_entities, references)]
        if not any(found) and not any(wanted):
            return 1.0, None, None  # nothing to find, and nothing found
        right = [2.0 * len(one & other) for one, other in zip(found, wanted, strict=True)]
        return ratio_interval(right, [len(one) + len(other) for one, other in zip(found, wanted, strict=True)], seed)


def _entities(tags: list[str]) -> set[Entity]:
    """(type, first word, word after the last)."""
    entities: set[Entity] = set()
    kind, start = "", 0
    for place, tag in enumerate([*tags, "O"]):
        prefix, dash, name = tag.partition("-")
        here = "" if tag == "O" else name if dash and prefix in ("B", "I") else tag
        if here != kind or (dash and prefix == "B"):
            if kind:
                entities.add((kind, start, place))
            kind, start = here, place
    return entities
