"""What may be spent to meet a budget: `search:` in a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from hf_shrink.errors import RecipeError
from hf_shrink.plan import STARVED
from hf_shrink.recipe.effort import EFFORTS
from hf_shrink.registry import did_you_mean
from hf_shrink.scheme import BITS
from hf_shrink.values import check_one_of

GENERATIONS = 12  # of the refinement where neither generations nor minutes are given


@dataclass(frozen=True)
class SearchSpec:
    """Which levers the search has, and how long it looks.

    Attributes:
        bits: of weights, beside leaving them dense; (): no weight is quantized.
        width: whether KV groups, query heads and channels may go.
        depth: whether whole blocks may go, and with `portable: false` their attentions and MLPs alone.
        embeddings: whether the input embedding and the output head may be quantized too, where `portable` allows it.
        group_size: columns that share a scale.
        effort: the work put into the weights once they are planned: fast, balanced or best.
        minutes: of the refinement on true KL divergence. None: no limit.
        generations: of the refinement; with them alone the same seed gives the same plan. None: as many as `minutes`
            allow, or 12 where there is no limit.
        rehearse: whether what looks best is carried out on a copy of the model with a part of the data, which tells
            what a run makes of it, before the search decides. Of models in memory; not without refinement.
        starved_experts: what happens to experts that saw too few calibration tokens for statistics of their own:
            "rtn": they are rounded to nearest without data, as the search takes them to be; or "error".
    """

    bits: tuple[int, ...] = (2, 3, 4, 8)
    width: bool = True
    depth: bool = True
    embeddings: bool = True
    group_size: int = 128
    effort: str = "balanced"
    minutes: float | None = None
    generations: int | None = None
    rehearse: bool = False
    starved_experts: Literal["error", "rtn"] = "rtn"

    def __post_init__(self) -> None:
        bits = self.bits
        if not isinstance(bits, list | tuple) or any(isinstance(b, bool) or b not in BITS for b in bits):
            raise RecipeError(f"search.bits is a list of whole numbers from 2 to 8, such as [2, 3, 4, 8], not {bits!r}")
        object.__setattr__(self, "bits", tuple(sorted(set(bits))))
        for name in ("width", "depth", "embeddings", "rehearse"):
            if not isinstance(getattr(self, name), bool):
                raise RecipeError(f"search.{name} must be true or false, not {getattr(self, name)!r}")
        if not (self.bits or self.width or self.depth):
            raise RecipeError("the search has nothing to choose from; give bits, width: true or depth: true")
        if self.effort not in EFFORTS:
            raise RecipeError(f"unknown effort {self.effort!r} in search; {did_you_mean(str(self.effort), EFFORTS)}")
        check_one_of(self.starved_experts, STARVED, "search.starved_experts")
        for name, least in (("group_size", 1), ("generations", 0)):
            value = getattr(self, name)
            if name == "generations" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise RecipeError(f"search.{name} must be a whole number of at least {least}, not {value!r}")
        minutes = self.minutes
        if minutes is not None and (isinstance(minutes, bool) or not isinstance(minutes, int | float) or minutes < 0):
            raise RecipeError(f"search.minutes must be a number of at least 0, not {minutes!r}")
        if self.rehearse and (minutes == 0 or self.generations == 0):
            raise RecipeError(
                "search.rehearse goes with refinement, which 0 minutes or generations leave out; give more of them, or "
                "leave rehearse out"
            )

    @classmethod
    def from_dict(cls, data: Any) -> SearchSpec:
        """From the recipe's form. Raises RecipeError that names the nearest valid key."""
        data = {} if data is None else data
        if not isinstance(data, Mapping):
            raise RecipeError(f"search must be a mapping such as {{bits: [2, 4], width: true}}, not {data!r}")
        valid = [field.name for field in fields(cls)]
        for key in data:
            if key not in valid:
                raise RecipeError(f"unknown key {key!r} in search; {did_you_mean(str(key), valid)}")
        return cls(**data)

    def to_dict(self) -> dict[str, Any]:
        """The form that `from_dict` reads."""
        data = {key: value for key, value in asdict(self).items() if value is not None}
        return {**data, "bits": list(self.bits)}
