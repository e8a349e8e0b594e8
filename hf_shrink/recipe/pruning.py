"""What a recipe wants taken out: prune steps, and the amounts that each kind of pruning takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from hf_shrink.errors import RecipeError
from hf_shrink.registry import did_you_mean
from hf_shrink.sparsity import Amount
from hf_shrink.values import as_list, check_switch

# Kinds of pruning in the order in which they are carried out, each with the keys of which a step takes exactly one
# to say how much. Kinds that decide by themselves what goes take none.
AMOUNTS: Mapping[str, tuple[str, ...]] = {
    "depth": ("ratio", "blocks"),
    "vocabulary": (),
    "hidden": ("ratio",),
    "experts": ("ratio", "experts"),
    "width": ("ratio",),
    "weights": ("sparsity", "threshold", "pattern"),
}
PRUNE_KINDS = tuple(AMOUNTS)
AMOUNT_KEYS = tuple(dict.fromkeys(key for keys in AMOUNTS.values() for key in keys))
# Keys of one kind only.
OWN_KEYS = {
    "units": "width",
    "parts": "depth",
    "targets": "weights",
    "ignore": "weights",
    "starved_experts": "weights",
}
COUNTS = ("blocks", "experts")  # whole numbers
UNITS = ("all", "attention", "mlp")
PARTS = ("blocks", "attention", "mlp", "any")
STARVED = ("error", "magnitude")


@dataclass(frozen=True)
class PruneStep:
    """Take something out of the model.

    Attributes:
        what: whole blocks (`depth`), tokens (`vocabulary`), channels of the residual stream (`hidden`), experts of
            mixtures (`experts`), heads and channels in the blocks (`width`), or single weights (`weights`).
        ratio: the fraction of all block parameters, as they are when the step starts, that the step removes.
        blocks: of depth: how many blocks go.
        experts: of experts: how many go from each block that has some.
        units: of width: which units.
        sparsity, threshold, pattern: of weights: see `sparsity.Amount`.
        targets, ignore: of weights: which modules, as in a quantize step.
        refit: whether matrices that read or write what was cut are refitted by least squares; of depth: the matrices
            that write the residual stream, from the first gap on; of weights: what is kept, where the run reads
            the inputs of matrices. Of experts and tokens nothing is.
        options: the fields of the method's own dataclass.
        parts: of depth: whether whole blocks go, only their attentions or MLPs, or either of these ("any").
        starved_experts: of weights: what happens to experts that saw too few calibration tokens for statistics of their
            own: "error", or "magnitude": their zeros are chosen by that. A quantize step behind it says it for both.
    """

    what: str
    method: str
    ratio: float | None = None
    blocks: int | None = None
    experts: int | None = None
    units: Literal["all", "attention", "mlp"] = "all"
    refit: bool = True
    sparsity: float | None = None
    threshold: float | None = None
    pattern: str | None = None
    targets: tuple[str, ...] | None = None
    ignore: tuple[str, ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    parts: Literal["blocks", "attention", "mlp", "any"] = "blocks"
    starved_experts: Literal["error", "magnitude"] = "error"

    def __post_init__(self) -> None:
        if self.what not in AMOUNTS:
            raise RecipeError(f"prune.what {self.what!r} is unknown; {did_you_mean(str(self.what), AMOUNTS)}")
        if self.units not in UNITS:
            raise RecipeError(f"prune.units {self.units!r} is unknown; {did_you_mean(str(self.units), UNITS)}")
        if self.parts not in PARTS:
            raise RecipeError(f"prune.parts {self.parts!r} is unknown; {did_you_mean(str(self.parts), PARTS)}")
        for own in fields(self):
            kind = OWN_KEYS.get(own.name, self.what)
            if kind != self.what and getattr(self, own.name) != own.default:
                instead = "there is parts" if (own.name, self.what) == ("units", "depth") else "leave it out"
                raise RecipeError(f"prune.{own.name} goes with what: {kind}; for {self.what} {instead}")
        if self.parts == "any" and self.blocks is not None:
            raise RecipeError("prune.parts any takes out things of different sizes: give ratio instead of blocks")
        if self.starved_experts not in STARVED:
            hint = did_you_mean(str(self.starved_experts), STARVED)
            raise RecipeError(f"unknown prune.starved_experts {self.starved_experts!r}; {hint}")
        self._check_amounts()
        self._check_weights()
        check_switch(self.refit, "prune.refit")
        for key in COUNTS:
            value = getattr(self, key)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
                raise RecipeError(f"prune.{key} must be a whole number of at least 0, not {value!r}")
        if self.ratio is not None and not (isinstance(self.ratio, int | float) and 0 <= self.ratio < 1):
            raise RecipeError(f"prune.ratio must be at least 0 and below 1, not {self.ratio!r}")

    def _check_amounts(self) -> None:
        """Raises RecipeError unless exactly one amount that the kind takes is given, and none that it does not take."""
        taken = AMOUNTS[self.what]
        given = [key for key in AMOUNT_KEYS if getattr(self, key) is not None]
        for key in given:
            if key not in taken:
                homes = " or ".join(f"what: {kind}" for kind, keys in AMOUNTS.items() if key in keys)
                instead = f"give {' or '.join(taken)}" if taken else "leave it out"
                raise RecipeError(f"prune.{key} goes with {homes}; for {self.what} {instead}")
        if taken and len(given) != 1:
            either = "either " if len(taken) == 2 else "one of " if len(taken) > 2 else ""
            raise RecipeError(f"prune with what: {self.what} takes {either}{' or '.join(taken)}")

    def _check_weights(self) -> None:
        """Raises RecipeError for a bad amount of single weights, and for targets that are no list."""
        for key in ("targets", "ignore"):
            value = getattr(self, key)
            if value is not None:
                object.__setattr__(self, key, as_list(value, f"prune.{key}"))
        if self.what == "weights":
            if isinstance(self.pattern, int):  # YAML 1.1 reads 2:4 without quotes as minutes and seconds
                object.__setattr__(self, "pattern", ":".join(map(str, divmod(self.pattern, 60))))
            self.amount  # noqa: B018  # its own checks

    @property
    def amount(self) -> Amount:
        """How many weights of every matrix become zero."""
        return Amount(self.sparsity, self.threshold, self.pattern)
