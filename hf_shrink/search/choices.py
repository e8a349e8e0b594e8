"""Which schemes weights may get, and on what the options of different groups have to agree."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping

from torch import nn
from transformers import PreTrainedModel

from hf_shrink.checkpoint.experts import expert_matrices, read_with_experts
from hf_shrink.plan import Scheme
from hf_shrink.search.agreement import common, one_scheme
from hf_shrink.search.pieces import Piece

Choice = Scheme | None  # None: dense
Pair = tuple[Choice, Choice]  # as it is measured under, and as it is stored


class Choices:
    """Of one model. Without `portable` everything is free.

    Attributes:
        all: the choices of everything but what stock reads with a mixture's experts.
        must_agree: whether all weights get the same scheme.

    Args:
        quantizable: paths of the weights inside blocks.

    Raises:
        RecipeError: as of `one_scheme`.
    """

    def __init__(
        self, model: nn.Module, schemes: Collection[Scheme], quantizable: Collection[str], *, portable: bool
    ) -> None:
        one = one_scheme(model, schemes, quantizable) if portable else None
        self.must_agree = one is not None
        self.all: list[Pair] = [(None, None), *zip(schemes, one or schemes, strict=True)]
        self._names: dict[Hashable, set[str]] = {}
        self._routed: frozenset[str] = frozenset()
        if portable and isinstance(model, PreTrainedModel):
            self._routed = frozenset(expert_matrices(model)).intersection(quantizable)
        self._with_experts: frozenset[str] = frozenset()
        self._of_experts = self.all
        if self._routed:
            assert isinstance(model, PreTrainedModel)
            self._with_experts = frozenset(read_with_experts(model, quantizable))
            alike = one or common(model, schemes, self._with_experts)
            self._of_experts = [(None, None), *zip(schemes, alike, strict=True)]

    @property
    def switches(self) -> tuple[tuple[str, ...], ...]:
        """See `Problem.switches`; of all that was asked for."""
        return tuple(tuple(sorted(names)) for names in self._names.values())

    def of(self, piece: Piece | None) -> list[Pair]:
        """What a piece may get; of no piece, nothing."""
        if piece is None:
            return [(None, None)]
        return self._of_experts if self._with_experts.intersection(piece.modules) else self.all

    def switch(self, key: Hashable, name: str) -> tuple[str]:
        """An option needs `name`, of all that is said under `key`."""
        self._names.setdefault(key, set()).add(name)
        return (name,)

    def needs(self, modules: Collection[str], schemes: Mapping[str, Scheme]) -> tuple[str, ...] | None:
        """What an option that gives `modules` these schemes needs; None where stock could not load it."""
        of_all, of_experts = self._of_all(schemes), self._of_mixtures(modules, schemes)
        return None if of_all is None or of_experts is None else (*of_all, *of_experts)

    def _of_all(self, schemes: Mapping[str, Scheme]) -> tuple[str, ...] | None:
        found = set(schemes.values())
        if not self.must_agree or not found:
            return ()
        return None if len(found) > 1 else self.switch("schemes", f"weights: {short(found.pop())}")

    def _of_mixtures(self, modules: Collection[str], schemes: Mapping[str, Scheme]) -> tuple[str, ...] | None:
        """Stock reads one scheme for all experts, and no dense ones beside anything that is packed."""
        if not self._routed:
            return ()
        routed = self._routed.intersection(modules)
        found = {schemes[path] for path in self._with_experts.intersection(modules) if path in schemes}
        if len(found) > 1 or (schemes and not routed <= schemes.keys()):
            return None
        if routed and not schemes:
            return self.switch("packed", "weights: dense")
        needs = self.switch("packed", "weights: packed") if schemes else ()
        return (*needs, *self.switch("experts", f"experts: {short(found.pop())}")) if found else needs


def named(*choices: Choice) -> str:
    """Of a part: the scheme of all, or of what writes its units and of what reads them."""
    names = list(dict.fromkeys(map(short, choices or (None,))))
    return names[0] if len(names) == 1 else f"{names[0]} in, {names[1]} out"


def short(scheme: Choice) -> str:
    """For example "W4 g64"."""
    if scheme is None:
        return "dense"
    size = f" g{scheme.group_size}" if scheme.group_size else f" per {scheme.strategy}"
    return f"W{scheme.bits}{size}{'' if scheme.symmetric else ' asymmetric'}"
