"""How many tokens the experts of a mixture see, and what each of them gets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from hf_shrink.errors import CalibrationError
from hf_shrink.runtime.experts import Watch, separate_modules
from hf_shrink.sharding import Share

# An expert needs one token for so many inputs of its widest matrix. Error of GPTQ on fresh tokens against RTN's, random
# matrices of 96 and 256 inputs with a decaying spectrum: 0.87 and 0.80 with a token for 8 inputs, 0.75 and 0.71 for 4,
# 0.47 for 2, 0.25 for 1, 0.15 for 1/8. Fewer tokens than this give little that rounding to nearest does not.
INPUTS_PER_TOKEN = 4
SHOWN = 8  # experts named in a message


def least_tokens(width: int) -> int:
    """Tokens that an expert must have seen for second moments of `width` inputs to be used."""
    return math.ceil(width / INPUTS_PER_TOKEN)


class ExpertTokens:
    """What the experts of a walk's current block see, by batch.

    Attributes:
        watches: by batch, of its latest run through the block.

    Args:
        model: whose experts were taken apart before the walk.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = separate_modules(model)
        self.watches: dict[int, Watch] = {}

    def phase(self, path: str) -> tuple[str, str] | None:
        """Equal for the matrices of all experts that run one after the other, none needing another's output."""
        found = self._place(path)
        if found is None:
            return None
        where, _, name = found
        return where, "down" if name == self._modules[where].names["down"] else "up"

    def inputs(self, batch: int, paths: Sequence[str], x: Tensor) -> list[tuple[list[str], Tensor]]:
        """Matrices that share an input, and the input. `x`: what the first of `paths`, all of one stage, gets."""
        phase = self.phase(paths[0])
        if phase is None:
            return [(list(paths), x)]
        module, watch = self._modules[phase[0]], self.watches[batch]
        found = []
        for index, own in self._by_expert(paths):
            given = watch.middle[module][index] if phase[1] == "down" else watch.inputs[module](index)
            found.append((own, given))
        return found

    def starved(self, matrices: Mapping[str, nn.Module], share: Share) -> dict[str, int]:
        """Experts with a matrix among `matrices` that got fewer tokens than `least_tokens`, by path, and how many.

        Args:
            share: which batches this process has; tokens of all count.
        """
        wanted: dict[str, int] = {}
        for path, matrix in matrices.items():
            if (place := self._place(path)) is not None:
                expert = f"{place[0]}.{place[1]}"
                width = int(matrix.in_features)  # type: ignore[arg-type]
                wanted[expert] = max(wanted.get(expert, 0), least_tokens(width))
        if not wanted:
            return {}
        totals = share.totals([self._total(expert) for expert in wanted])
        return {expert: int(total) for expert, total in zip(wanted, totals, strict=True) if total < wanted[expert]}

    def _total(self, expert: str) -> int:
        where, _, index = expert.rpartition(".")
        seen = [watch.counts.get(self._modules[where]) for watch in self.watches.values()]
        return sum(int(counts[int(index)]) for counts in seen if counts is not None)

    def _by_expert(self, paths: Iterable[str]) -> list[tuple[int, list[str]]]:
        own: dict[int, list[str]] = {}
        for path in paths:
            place = self._place(path)
            assert place is not None
            own.setdefault(place[1], []).append(path)
        return list(own.items())

    def _place(self, path: str) -> tuple[str, int, str] | None:
        """(path of the module, expert, name of the matrix); None for a matrix that is no expert's."""
        expert, _, name = path.rpartition(".")
        where, _, index = expert.rpartition(".")
        return (where, int(index), name) if where in self._modules else None


def refuse_starved(starved: Mapping[str, int], matrices: Mapping[str, nn.Module]) -> None:
    """Raises CalibrationError naming the experts, their counts and what to do."""
    if not starved:
        return
    widest = max(int(m.in_features) for p, m in matrices.items() if p.rpartition(".")[0] in starved)  # type: ignore[arg-type]
    shown = ", ".join(f"{expert} ({count})" for expert, count in list(starved.items())[:SHOWN])
    more = f" and {len(starved) - SHOWN} more" if len(starved) > SHOWN else ""
    raise CalibrationError(
        f"{len(starved)} experts saw too few calibration tokens for statistics of their own: {shown}{more}; "
        f"at least {least_tokens(widest)} are needed for inputs of width {widest}. Give more samples "
        "(--set calibration.samples=...) or more varied data, compress these experts without data "
        "(--set quantize.starved_experts=rtn; of a recipe with a budget --set search.starved_experts=rtn; of one that "
        "only prunes weights --set prune.weights.starved_experts=magnitude), or use method: rtn (to prune: magnitude)"
    )


def starved_note(starved: Mapping[str, int]) -> str:
    """For the report: which experts were rounded, or lost channels, without data."""
    shown = ", ".join(f"{expert} ({count} tokens)" for expert, count in list(starved.items())[:SHOWN])
    more = f" and {len(starved) - SHOWN} more" if len(starved) > SHOWN else ""
    return f"{len(starved)} experts saw too few calibration tokens and were compressed without data: {shown}{more}"
