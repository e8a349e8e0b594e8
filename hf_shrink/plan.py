"""A Plan says exactly what is done to a model: which units are kept, which scheme each weight gets. Data only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from hf_shrink.errors import RecipeError
from hf_shrink.paths import json_text
from hf_shrink.scheme import BITS, KINDS, STRATEGIES, Kind, Scheme, Strategy
from hf_shrink.sparsity import WeightsPlan
from hf_shrink.stacks import BlockPlan, StackPlan
from hf_shrink.tokens import VocabularyPlan
from hf_shrink.values import as_list, check_one_of, check_switch, is_whole

__all__ = [
    "BITS",
    "DTYPES",
    "FORMATS",
    "KINDS",
    "PLAN_FORMAT",
    "STARVED",
    "STRATEGIES",
    "BlockPlan",
    "HiddenPlan",
    "Kind",
    "Plan",
    "Scheme",
    "StackPlan",
    "Strategy",
    "VocabularyPlan",
    "WeightsPlan",
]

PLAN_FORMAT = 1
DTYPES = ("keep", "float32", "bfloat16", "float16")
STARVED = ("error", "rtn")
# Formats of other libraries, and the bits that they take for a weight.
FORMATS: Mapping[str, int] = {"NF4": 4, "FP4": 4, "LLM.int8": 8}
TransformSpec = str | Mapping[str, Mapping[str, Any]]  # a name, or {name: options}


def split_transform(spec: TransformSpec) -> tuple[str, Mapping[str, Any]]:
    """A transform's name and options. Raises RecipeError where it is neither a name nor one name with options."""
    if isinstance(spec, str):
        return spec, {}
    if isinstance(spec, Mapping) and len(spec) == 1:
        ((name, options),) = spec.items()
        if isinstance(name, str) and isinstance(options, Mapping):
            return name, options
    raise RecipeError(f"a transform is a name, or a name with options such as {{awq: {{grid: 40}}}}, not {spec!r}")


@dataclass(frozen=True)
class HiddenPlan:
    """To how many channels the residual stream is cut. Which directions these are is found while the plan is applied.

    Attributes:
        stack: name of the stack whose stream it is.
        width: channels that are left.
        method: what chooses the directions, and its options.
        refit: whether what reads and writes the stream is refitted by least squares.
        untie: whether a head that shares the embedding's weight gets one of its own.
    """

    stack: str
    width: int
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    refit: bool = True
    untie: bool = False

    def __post_init__(self) -> None:
        if not is_whole(self.width):
            raise RecipeError(f"hidden.width must be a whole number, not {self.width!r}")
        for name in ("refit", "untie"):
            check_switch(getattr(self, name), f"hidden.{name}")


@dataclass(frozen=True)
class Plan:
    """Everything that is done to one model.

    Attributes:
        model_type: the source's `config.model_type`, checked before the plan is applied.
        depths: blocks that each row of them has in the source, checked too; empty: not said, as in plans of old.
        stacks: by stack name; a stack without an entry keeps everything.
        schemes: by module path **in the source model**, for every weight that is quantized.
        formats: by module path in the source model, the format (a name in `FORMATS`) of every weight that another
            library stores, through transformers' integration; beside it there are no schemes.
        method: name of the quantization method, and its options, by step order of `schemes`' users.
        options: the method's options.
        transforms: names, or {name: options}, of what is folded into the weights before they are rounded, in order.
        tune: options of the tuning after rounding; empty: none.
        starved_experts: what happens to experts that saw too few calibration tokens: an error, or they are compressed
            without data (rounded to nearest, zeros by magnitude).
        effort: the level that method, transforms and tune were chosen by, to be shown; nothing is decided by it.
        refit: whether `output` and `down` are refitted by least squares after width pruning.
        damage: predicted damage by what was removed (free form, for reports).
        vocabulary: what is kept of it; None: all.
        weights: which matrices get zeros, and how many; None: none.
        hidden: to what the residual stream is cut; None: it stays.
        repair: whether the blocks left are refitted to the dense model's residual stream after depth pruning.
        dtype: of what is not quantized, one of `DTYPES`; "keep": as the source has it.
        calibration: which data statistics come from, in the form of a recipe's `calibration`; empty: its defaults.
        search: what a search for a budget says of the plan (limits, what it takes of them, predicted and measured KL
            divergence), to be shown; empty: there was none.
    """

    model_type: str
    stacks: Mapping[str, StackPlan] = field(default_factory=dict)
    schemes: Mapping[str, Scheme] = field(default_factory=dict)
    formats: Mapping[str, str] = field(default_factory=dict)
    method: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    transforms: tuple[TransformSpec, ...] = ()
    tune: Mapping[str, Any] = field(default_factory=dict)
    starved_experts: Literal["error", "rtn"] = "error"
    effort: str | None = None
    refit: bool = True
    damage: Mapping[str, float] = field(default_factory=dict)
    vocabulary: VocabularyPlan | None = None
    weights: WeightsPlan | None = None
    hidden: HiddenPlan | None = None
    repair: bool = False
    dtype: str = "keep"
    calibration: Mapping[str, Any] = field(default_factory=dict)
    search: Mapping[str, Any] = field(default_factory=dict)
    depths: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("refit", "repair"):
            check_switch(getattr(self, name), name)
        for name in ("formats", "options", "tune", "damage", "calibration", "search", "depths"):
            if not isinstance(getattr(self, name), Mapping):
                raise RecipeError(f"{name} must be a mapping, not {getattr(self, name)!r}")
        if self.method is not None and not isinstance(self.method, str):
            raise RecipeError(f"method is a name such as gptq, or null, not {self.method!r}")
        check_one_of(self.starved_experts, STARVED, "starved_experts")
        check_one_of(self.dtype, DTYPES, "dtype")
        for found in self.formats.values():
            check_one_of(found, FORMATS, "format")

    @property
    def prunes(self) -> bool:
        return bool(self.stacks) or self.hidden is not None

    @property
    def bits(self) -> dict[str, int]:
        """Bits of every weight that is quantized, by module path in the source model."""
        return {path: s.bits for path, s in self.schemes.items()} | {p: FORMATS[f] for p, f in self.formats.items()}

    def to_json(self, path: str | Path | None = None) -> str:
        """The plan as JSON text, also written to `path` when given."""
        stacks = {name: stack.to_dict() for name, stack in self.stacks.items()}
        said = {"plan_format": PLAN_FORMAT, **asdict(replace(self, stacks={})), "stacks": stacks}
        text = json.dumps(said, indent=1)
        if path is not None:
            Path(path).write_text(text)
        return text

    @classmethod
    def from_json(cls, source: str | Path | Mapping[str, Any]) -> Plan:
        """A plan from JSON text, a path, or the decoded mapping. Raises RecipeError where it is not a plan."""
        if isinstance(source, Mapping):
            data = dict(source)
        else:
            try:
                data = json.loads(json_text(source, "plan"))
            except json.JSONDecodeError as error:
                raise RecipeError(f"not a plan: {error}") from error
        if not isinstance(data, dict) or data.pop("plan_format", None) != PLAN_FORMAT:
            raise RecipeError(f"not a plan of format {PLAN_FORMAT}; make one with `hf-shrink plan` or make_plan()")
        try:
            stacks = {name: StackPlan.from_dict(stack) for name, stack in data.pop("stacks").items()}
            schemes = {path: _scheme(path, scheme) for path, scheme in data.pop("schemes").items()}
            transforms = as_list(data.pop("transforms", ()), "transforms")
            vocabulary = data.pop("vocabulary", None)
            data["vocabulary"] = None if vocabulary is None else VocabularyPlan(**vocabulary)
            weights = data.pop("weights", None)
            weights = None if weights is None else WeightsPlan.from_dict(weights)
            hidden = data.pop("hidden", None)
            hidden = None if hidden is None else HiddenPlan(**hidden)
            return cls(stacks=stacks, schemes=schemes, transforms=transforms, weights=weights, hidden=hidden, **data)
        except RecipeError as error:
            raise RecipeError(f"not a plan: {error}") from error
        except (KeyError, TypeError, AttributeError) as error:
            raise RecipeError(f"not a plan: {error!r}") from error

    def summary(self) -> str:
        """One line a stack and one a scheme: how much is kept, what is quantized how, and by which work."""
        lines = []
        if self.vocabulary is not None:
            kept = sum(index < self.vocabulary.rows for index in self.vocabulary.ids)
            lines.append(f"vocabulary: {kept:,} of {self.vocabulary.rows:,} tokens kept")
        for name, stack in self.stacks.items():
            lines += stack.summary(name)
        if self.hidden is not None:
            how = f"{self.hidden.method}{', refitted' if self.hidden.refit else ''}"
            head = ", the head gets a weight of its own" if self.hidden.untie else ""
            lines.append(f"{self.hidden.stack}: residual stream of {self.hidden.width} channels ({how}){head}")
        lines += self.weights.summary() if self.weights is not None else []
        by_scheme: dict[Scheme, int] = {}
        for scheme in self.schemes.values():
            by_scheme[scheme] = by_scheme.get(scheme, 0) + 1
        for scheme, count in by_scheme.items():
            group = f" g{scheme.group_size}" if scheme.group_size else f" per {scheme.strategy}"
            kind = "symmetric" if scheme.symmetric else "asymmetric"
            inputs = "" if scheme.activation_bits == 16 else f", inputs in int{scheme.activation_bits} per token"
            inputs += " without zero points" if scheme.activation_symmetric else ""
            lines.append(f"{count} weights {scheme.name}{group} {kind} by {self.method}{inputs}")
        for kind in dict.fromkeys(self.formats.values()):
            count = sum(found == kind for found in self.formats.values())
            lines.append(f"{count} weights {kind} by {self.method}")
        if self.schemes or self.formats:
            lines += self._work()
        if self.search:
            lines.append(self._searched())
        return "\n".join(lines) or "nothing to do"

    def _searched(self) -> str:
        """What the search for a budget says of the plan."""
        found = self.search
        words = [f"{found['bytes'] / 1e6:.4g} MB"] if "bytes" in found else []
        for key, name in (
            ("predicted_kl", "predicted of a run"),
            ("measured_kl", "measured, weights compressed one by one"),
            ("rehearsed_kl", "measured after a run on a part of the data"),
        ):
            words += [f"KL {found[key]:.4g} ({name})"] if key in found else []
        return f"found by a search for a budget: {', '.join(words)}"

    def _work(self) -> list[str]:
        """What is done around and by the method; first what the effort level stands for, as a recipe would say it."""
        tune = _pairs(self.tune)
        transforms = ", ".join(map(_named, self.transforms))
        lines = []
        if self.effort is not None:
            parts = [f"method: {self.method}"]
            parts += [f"transforms: [{transforms}]"] if self.transforms else []
            parts += [f"tune: {{{tune}}}"] if tune else []
            lines.append(f"effort {self.effort} = {', '.join(parts)}")
        if self.options:
            lines.append(f"options of {self.method}: {_pairs(self.options)}")
        if self.transforms:
            lines.append(f"before rounding, folded into the weights: {transforms}")
        if tune:
            lines.append(f"after rounding, scales, zero points and norms are tuned: {tune}")
        return lines


def _scheme(path: str, said: Mapping[str, Any]) -> Scheme:
    """Raises RecipeError naming the weight."""
    try:
        return Scheme(**said)
    except (RecipeError, TypeError) as error:
        raise RecipeError(f"schemes of {path}: {error}") from error


def _named(transform: TransformSpec) -> str:
    name, options = split_transform(transform)
    return f"{name} ({_pairs(options)})" if options else name


def _pairs(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}: {value}" for key, value in options.items())
