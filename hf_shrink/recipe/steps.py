"""What a recipe wants done: quantize steps, and prune steps from their own file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from hf_shrink.errors import RecipeError
from hf_shrink.plan import STARVED, STRATEGIES, Scheme, Strategy, TransformSpec, split_transform
from hf_shrink.recipe.formats import FORMAT_METHOD, check_formats, format_of
from hf_shrink.recipe.pruning import PruneStep
from hf_shrink.registry import did_you_mean
from hf_shrink.values import as_list, check_one_of, check_switch

GROUP_SIZE = 128


@dataclass(frozen=True)
class QuantizeStep:
    """Store weights in few bits.

    Attributes:
        scheme: W2A16 to W8A16, W8A8 or FP8A16; with method bitsandbytes NF4, FP4 or LLM.int8, which leave no other key
            but targets, ignore and the method's options.
        targets: class names of matrices ("Linear", "Embedding"), paths of modules, which mean what is inside them too,
            or "re:" regexes (matched from the start of the path, as in compressed-tensors). None: every Linear inside
            the blocks.
        ignore: the same forms; None: output head, task heads, routers, tied weights. `[]`: nothing is ignored.
        overrides: by target, any of scheme, symmetric, strategy, group_size, symmetric_inputs. Path before the path
            of what is around it before regexes in written order before class names.
        head: the scheme of the output head and of an embedding that is tied to it, as a name or a mapping like an
            override's; W8A16 then has one scale per row. It wins over `targets` and `ignore`. Both stay dense, with a
            note, where the embedding is of a class of its own (a scaled one). None: as these say.
        symmetric, strategy, group_size: W8A8 and FP8A16 are symmetric with one scale per channel; the default
            group size does not apply to them, nor to another strategy than "group", and another one is an error.
        symmetric_inputs: of W8A8: round inputs without zero points, for engines that have no others; less exact.
        effort: in place of method, transforms and tune: "fast", "balanced" or "best"; see `recipe/effort.py`. Already
            expanded when a step was read from a recipe; kept to be shown.
        transforms: transforms that are folded into the weights before they are rounded, in their order; each a name,
            or {name: options}.
        tune: options of the tuning of scales, zero points and norms after rounding, for example {steps: 100}; empty:
            no tuning.
        starved_experts: what happens to experts that saw too few calibration tokens for statistics of their own:
            "error", or "rtn": they are rounded to nearest without data, after zeros chosen by magnitude where weights
            are pruned too.
        options: the fields of the method's own dataclass.
    """

    method: str = "gptq"
    scheme: str = "W4A16"
    symmetric: bool = True
    strategy: Strategy = "group"
    group_size: int | None = GROUP_SIZE
    symmetric_inputs: bool = False
    targets: tuple[str, ...] | None = None
    ignore: tuple[str, ...] | None = None
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    head: str | Mapping[str, Any] | None = None
    effort: str | None = None
    transforms: tuple[TransformSpec, ...] = ()
    tune: Mapping[str, Any] = field(default_factory=dict)
    starved_experts: Literal["error", "rtn"] = "error"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.tune, Mapping):
            raise RecipeError(f"quantize.tune must be a mapping such as {{steps: 100}}, not {self.tune!r}")
        for name, missing in (("targets", None), ("ignore", None), ("transforms", ())):
            value = getattr(self, name)
            found = missing if value is None else as_list(value, f"quantize.{name}")
            object.__setattr__(self, name, found)
        for name in ("symmetric", "symmetric_inputs"):
            check_switch(getattr(self, name), f"quantize.{name}")
        if not isinstance(self.method, str):
            raise RecipeError(f"quantize.method is a name such as gptq, not {self.method!r}")
        for transform in self.transforms:
            split_transform(transform)
        check_one_of(self.starved_experts, STARVED, "quantize.starved_experts")
        check_one_of(self.strategy, STRATEGIES, "strategy")
        standard = {f.name: f.default for f in fields(self)}
        check_formats({k: v for k, v in vars(self).items() if k in ("method", "scheme") or v != standard[k]})
        if self.format is not None:
            object.__setattr__(self, "scheme", self.format)
            return
        self.base_scheme()
        for target, override in self.overrides.items():
            if not isinstance(override, Mapping):
                raise RecipeError(f"quantize.overrides[{target!r}] must be a mapping such as {{scheme: W8A16}}")
            self.scheme_with(override)
        if self.head is not None and not isinstance(self.head, str | Mapping):
            raise RecipeError(f"quantize.head is a scheme such as W8A16, not {self.head!r}")
        if self.head_scheme().activation_bits < 16:
            raise RecipeError(f"quantize.head cannot be {self.head_scheme().name}, which rounds inputs; use W8A16")
        rounded = [self.base_scheme(), *map(self.scheme_with, self.overrides.values())]
        if self.group_size not in (None, GROUP_SIZE):
            grouped = rounded if self.head is None else [*rounded, self.head_scheme()]
            if all(scheme.strategy != "group" for scheme in grouped):
                self.scheme_with({"group_size": self.group_size})  # raises: it says what the size does not go with
        if self.symmetric_inputs and all(scheme.activation_bits == 16 for scheme in rounded):
            raise RecipeError(f"{self.scheme} does not round its inputs; symmetric_inputs goes with W8A8")

    @property
    def format(self) -> str | None:
        """The other library's format that the step asks for; None where it asks for a scheme of ours."""
        return format_of(self.scheme) if self.method == FORMAT_METHOD else None

    def base_scheme(self) -> Scheme:
        return self.scheme_with({})

    def head_scheme(self) -> Scheme:
        """What `head` asks for; W8A16 where it is None."""
        asked = {"scheme": self.head or "W8A16"} if not isinstance(self.head, Mapping) else dict(self.head)
        if Scheme.bits_of(str(asked.get("scheme", self.scheme))) == 8 and "group_size" not in asked:
            asked.setdefault("strategy", "channel")
        return self.scheme_with(asked)

    def scheme_with(self, override: Mapping[str, Any]) -> Scheme:
        """The step's scheme with an override's keys replaced. Raises RecipeError for unknown keys and values."""
        valid = ("scheme", "symmetric", "strategy", "group_size", "symmetric_inputs")
        for key in override:
            if key not in valid:
                raise RecipeError(f"unknown key {key!r} in quantize.overrides; {did_you_mean(key, valid)}")
        name = str(override.get("scheme", self.scheme))
        kind = Scheme.kind_of(name)
        form: dict[str, Any] = {"symmetric": True, "strategy": "group", "group_size": GROUP_SIZE}
        if kind.by_channel == Scheme.kind_of(self.scheme).by_channel:  # else what the step says is not meant for it
            form = {key: getattr(self, key) for key in form}
        form.update((key, override[key]) for key in form if key in override)
        inputs = override.get("symmetric_inputs", self.symmetric_inputs)
        for key, value in (("symmetric", form["symmetric"]), ("symmetric_inputs", inputs)):
            check_switch(value, f"quantize.{key}")
        if override.get("symmetric_inputs") and kind.activation_bits == 16:
            raise RecipeError(f"{name} does not round its inputs; symmetric_inputs goes with W8A8")
        if kind.by_channel:
            _check_by_channel(name, form, (None,) if "group_size" in override else (None, GROUP_SIZE))
            inputs = inputs and kind.activation_bits < 16
            return Scheme(kind.bits, True, "channel", None, kind.type, kind.activation_bits, inputs)
        if form["strategy"] != "group" and "group_size" not in override:
            form["group_size"] = None  # the step's, or the default, is for other weights
        return Scheme(kind.bits, **form)


def _check_by_channel(name: str, form: Mapping[str, Any], group_sizes: tuple[int | None, ...]) -> None:
    """Raises RecipeError where a scheme with one scale per channel is asked to be anything else than by default."""
    if not form["symmetric"]:
        raise RecipeError(f"{name} has no zero points; take out symmetric: {form['symmetric']}")
    allowed = {"strategy": ("channel", "group"), "group_size": group_sizes}
    for key, values in allowed.items():
        if form[key] not in values:
            raise RecipeError(f"{name} has one scale per channel; take out {key}: {form[key]}")


Step = PruneStep | QuantizeStep
