"""A Recipe says what the user wants. Parsed and validated once, here and in the methods' own registries."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from hf_shrink.errors import RecipeError
from hf_shrink.plan import DTYPES, Scheme
from hf_shrink.recipe.budget import Budget
from hf_shrink.recipe.effort import collapse, expand
from hf_shrink.recipe.formats import GRID_KEYS, check_formats
from hf_shrink.recipe.pruning import AMOUNT_KEYS, AMOUNTS, OWN_KEYS, PRUNE_KINDS, PruneStep
from hf_shrink.recipe.search import SearchSpec
from hf_shrink.recipe.specs import METRICS, CalibrationSpec, EvaluationSpec
from hf_shrink.recipe.steps import QuantizeStep, Step
from hf_shrink.registry import did_you_mean

__all__ = [
    "METRICS",
    "Budget",
    "CalibrationSpec",
    "EvaluationSpec",
    "PruneStep",
    "QuantizeStep",
    "Recipe",
    "SearchSpec",
    "Step",
]

KEYS = ("name", "portable", "dtype", "calibration", "steps", "budget", "search", "evaluation")


@dataclass(frozen=True)
class Recipe:
    """What the user wants done: steps, or a budget and what may be searched. `from_dict` and `from_yaml` validate."""

    steps: tuple[Step, ...] = ()
    name: str = "custom"
    portable: bool = True
    dtype: str = "keep"
    calibration: CalibrationSpec = field(default_factory=CalibrationSpec)
    evaluation: EvaluationSpec = field(default_factory=EvaluationSpec)
    budget: Budget | None = None
    search: SearchSpec | None = None

    def __post_init__(self) -> None:
        if self.budget is not None and self.steps:
            raise RecipeError(
                "the recipe has steps and a budget; give the steps, or a budget and let the search decide what is done"
            )
        if self.budget is None and self.search is not None:
            raise RecipeError("search goes with a budget; add one such as budget: {bytes: 30%}")
        if self.budget is not None and self.search is None:
            object.__setattr__(self, "search", SearchSpec())
        if not self.steps and self.budget is None:
            raise RecipeError("the recipe has no steps; add a prune or a quantize step, or a budget")
        if self.dtype not in DTYPES:
            raise RecipeError(f"unknown dtype {self.dtype!r}; {did_you_mean(str(self.dtype), DTYPES)}")
        if self.evaluation.stride is not None:
            raise RecipeError(
                "after a run windows do not overlap; take evaluation.stride out, and measure the result with "
                "hf-shrink evaluate --stride"
            )
        kinds = [step.what if isinstance(step, PruneStep) else "quantize" for step in self.steps]
        order = [*PRUNE_KINDS, "quantize"]
        for before, after in itertools.pairwise(kinds):
            if order.index(before) >= order.index(after):
                raise RecipeError(
                    f"step {after!r} cannot follow {before!r}: steps run in the order {', '.join(order)}, each at most "
                    "once; for more rounds run hf-shrink again on the result"
                )

        zeros = self.prune("weights")
        if self.quantize is not None and zeros is not None and zeros.starved_experts != "error":
            raise RecipeError(
                "prune.starved_experts is for recipes without a quantize step; take it out and say "
                "quantize.starved_experts: rtn, which chooses zeros of such experts by magnitude too"
            )

    @property
    def quantize(self) -> QuantizeStep | None:
        return next((s for s in self.steps if isinstance(s, QuantizeStep)), None)

    def prune(self, what: str) -> PruneStep | None:
        return next((s for s in self.steps if isinstance(s, PruneStep) and s.what == what), None)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], name: str = "custom", *, portable: bool = True) -> Recipe:
        """Validate a decoded recipe; `portable`: where it does not say it. Raises RecipeError that names the nearest
        valid key."""
        data = dict(_mapping(data, "the recipe"))
        _check_keys(data, KEYS, "the recipe")
        steps = data.get("steps", () if data.get("budget") is not None else None)
        if not isinstance(steps, list | tuple):
            raise RecipeError("the recipe's `steps` must be a list of prune and quantize steps")
        portable = data.get("portable", portable)
        if not isinstance(portable, bool):
            raise RecipeError(f"portable must be true or false, not {portable!r}")
        return cls(
            steps=tuple(_step(s) for s in steps),
            name=str(data.get("name", name)),
            portable=portable,
            dtype=str(data.get("dtype", "keep")),
            calibration=_section(CalibrationSpec, data.get("calibration"), "calibration"),
            evaluation=_section(EvaluationSpec, data.get("evaluation"), "evaluation"),
            budget=None if data.get("budget") is None else Budget.from_dict(data["budget"]),
            search=None if data.get("search") is None else SearchSpec.from_dict(data["search"]),
        )

    @classmethod
    def from_yaml(cls, path: str | Path, *, portable: bool = True) -> Recipe:
        """Read a YAML file with the safe loader; `portable` as for `from_dict`. Raises RecipeError."""
        path = Path(path)
        try:
            data = yaml.safe_load(path.read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"cannot read recipe {path}: {error}") from error
        except yaml.YAMLError as error:
            raise RecipeError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from error
        return cls.from_dict(_mapping(data, f"recipe {path}"), name=path.stem, portable=portable)

    def to_dict(self) -> dict[str, Any]:
        """The form that `from_dict` reads."""
        steps: list[dict[str, Any]] = []
        for step in self.steps:
            body = {k: v for k, v in asdict(step).items() if k != "options" and v not in (None, {})}
            if not body.get("transforms"):
                body.pop("transforms", None)
            body.update(step.options)
            if isinstance(step, QuantizeStep) and (step.format is not None or Scheme.kind_of(step.scheme).by_channel):
                # Defaults, or what the scheme's name says anyway.
                body = {key: value for key, value in body.items() if key not in GRID_KEYS}
            for key in ("targets", "ignore", "transforms"):
                if key in body:
                    body[key] = list(body[key])
            steps.append({"prune" if isinstance(step, PruneStep) else "quantize": body})
        evaluation = {k: v for k, v in asdict(self.evaluation).items() if v is not None}
        evaluation["metrics"] = list(evaluation["metrics"])
        what: dict[str, Any] = {"steps": steps}
        if self.budget is not None and self.search is not None:
            what = {"budget": self.budget.to_dict(), "search": self.search.to_dict()}
        return {
            "name": self.name,
            "portable": self.portable,
            "dtype": self.dtype,
            "calibration": asdict(self.calibration),
            **what,
            "evaluation": evaluation,
        }

    def with_overrides(self, assignments: Iterable[str]) -> Recipe:
        """Apply `--set` assignments such as "quantize.group_size=64" or "calibration.samples=16".

        `prune.` and `quantize.` change that key in every step of the kind (of prune steps: that takes it),
        `prune.depth.ratio` only in those of what is named, which is needed where the amounts of several would change;
        `budget.latency.decode=60%` goes one deeper. Values are read as YAML; null takes a budget away.
        """
        data = copy.deepcopy(self.to_dict())
        for assignment in assignments:
            key, equals, text = assignment.partition("=")
            section, dot, leaf = key.strip().partition(".")
            if not equals or (not leaf and section not in ("portable", "dtype")):
                raise RecipeError(
                    f"--set takes section.key=value, for example quantize.group_size=64, not {assignment!r}"
                )
            try:
                value = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise RecipeError(f"--set {assignment!r}: the value is not valid YAML") from error
            if section in ("portable", "dtype") and not dot:
                data[section] = value
            elif section in ("calibration", "evaluation"):
                data[section][leaf] = value
            elif section in ("budget", "search"):
                if section not in data:
                    raise RecipeError(f"--set {assignment!r}: the recipe has steps, and no budget to search for")
                _put(data[section], leaf, value)
            elif section in ("prune", "quantize"):
                bodies = [s[section] for s in data.get("steps", ()) if section in s]
                what, _, inner = leaf.partition(".")
                if section == "prune" and inner and what in AMOUNTS:
                    bodies, leaf = [body for body in bodies if body["what"] == what], inner
                if not bodies:
                    step = f"{section} step{f' with what: {what}' if leaf == inner else ''}"
                    raise RecipeError(f"--set {assignment!r}: the recipe has no {step}")
                if section == "prune" and leaf in OWN_KEYS:
                    bodies = [body for body in bodies if body["what"] == OWN_KEYS[leaf]] or bodies
                if section == "prune" and leaf in AMOUNT_KEYS:
                    bodies = _give_way(bodies, leaf)
                    if len(kinds := [f"prune.{body['what']}.{leaf}" for body in bodies]) > 1:
                        raise RecipeError(f"--set {assignment!r}: several steps take it; say {' or '.join(kinds)}")
                for body in bodies:
                    if section == "quantize" and leaf == "effort":
                        _forget_expansion(body)
                    elif section == "quantize" and leaf == "scheme":
                        collapse(body)
                    body[leaf] = value
            else:
                valid = ("calibration", "evaluation", "budget", "search", "prune", "quantize", "portable", "dtype")
                raise RecipeError(f"--set {assignment!r}: unknown section {section!r}; {did_you_mean(section, valid)}")
        return Recipe.from_dict(data, name=self.name)


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RecipeError(f"{where} must be a mapping of keys to values, not {type(value).__name__}")
    return value


def _check_keys(data: Mapping[str, Any], valid: Iterable[str], where: str) -> None:
    valid = list(valid)
    for key in data:
        if key not in valid:
            raise RecipeError(f"unknown key {key!r} in {where}; {did_you_mean(key, valid)}")


def _put(section: dict[str, Any], path: str, value: Any) -> None:
    """Set the key that a dotted path names. Raises RecipeError where the path goes through something with no keys."""
    first, dot, rest = path.partition(".")
    if not dot:
        section[first] = value
        return
    inner = section.setdefault(first, {})
    if not isinstance(inner, dict):
        raise RecipeError(f"--set: {first} is {inner!r}, which has no keys such as {rest!r}")
    _put(inner, rest, value)


def _forget_expansion(body: dict[str, Any]) -> None:
    """Take out of a quantize step what an effort level chooses: the method with its options, transforms, tuning."""
    own = {f.name for f in fields(QuantizeStep)}
    for key in [k for k in body if k in ("method", "transforms", "tune") or k not in own]:
        del body[key]


def _give_way(bodies: list[dict[str, Any]], amount: str) -> list[dict[str, Any]]:
    """The prune steps that take an amount, without their present one; all of them where none takes it."""
    taking = [body for body in bodies if amount in AMOUNTS.get(body["what"], ())] or bodies
    for body in taking:
        for key in AMOUNT_KEYS:
            body.pop(key, None)
    return taking


def _section(cls: type[Any], data: Any, where: str) -> Any:
    data = _mapping({} if data is None else data, where)
    _check_keys(data, [f.name for f in fields(cls)], where)
    return cls(**data)


def _step(data: Any) -> Step:
    data = _mapping(data, "a step")
    if len(data) != 1:
        raise RecipeError(f"a step has one key, prune or quantize; this one has {', '.join(map(str, data)) or 'none'}")
    ((kind, body),) = data.items()
    _check_keys(data, ("prune", "quantize"), "a step")
    cls: type[Any] = PruneStep if kind == "prune" else QuantizeStep
    body = dict(_mapping({} if body is None else body, kind))
    if kind == "quantize":
        body = expand(body)
        check_formats(body)
    own = {f.name for f in fields(cls)} - {"options"}
    options = {k: body.pop(k) for k in list(body) if k not in own}
    if kind == "prune":
        for key in ("what", "method"):
            if key not in body:
                example = {"what": "depth", "method": "kl_greedy"}[key]
                hint = did_you_mean(next(iter(options)), own) if options else f"for example {key}: {example}"
                raise RecipeError(f"a prune step needs {key!r}; {hint}")
    step: Step = cls(**body, options=options)
    return step
