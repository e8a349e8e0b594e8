"""A family for a model type without a table: guessed by transformers' conventions, kept where numbers confirm it."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from hf_shrink.architectures.base import Attention, Family, Mlp, Stack
from hf_shrink.architectures.bound import BoundStack
from hf_shrink.architectures.conventions import attentions, mlps
from hf_shrink.architectures.declared import bind_stack
from hf_shrink.architectures.keys import with_channels, with_depth, with_heads
from hf_shrink.architectures.probe import build, find_inputs, outputs, plain_tensors
from hf_shrink.architectures.search import find_stacks
from hf_shrink.architectures.tiny import rebuilt, shrunken
from hf_shrink.architectures.verify import Probe, check_absence, check_width, parts_of

FOUND = "found by the names of its modules, which says nothing of norms"


@dataclass(frozen=True)
class Derived:
    """What was found of a model type: a family, or None; and why what is missing is missing."""

    family: Family | None
    reasons: tuple[str, ...]


_Modules = set[tuple[str, str]]  # every module's place and class
_known: dict[tuple[type, str], tuple[Derived, _Modules]] = {}


def derive(model: PreTrainedModel) -> Derived:
    """The family of a model's class and config. Nothing is taken from the model's weights or present sizes.

    Only what was verified is in it: parts that fail are left out, with the reason, so they cannot be pruned.
    """
    kind = type(model)
    try:
        small = rebuilt(shrunken(model.config))
        key = (kind, json.dumps(small.to_dict(), sort_keys=True, default=str))
        with plain_tensors():
            if key not in _known:
                _known[key] = _derive(kind, small)
            derived, modules = _known[key]
            if modules != _structure(build(kind, _dense(model.config), meta=True)):
                return Derived(None, ("a small copy to verify on has other modules than the model",))
        return derived
    except Exception as error:  # whatever a class does with a config that does not suit it: it can still be quantized
        return Derived(None, (f"a small copy to verify on: {error}",))


def _derive(kind: type[PreTrainedModel], small: PretrainedConfig) -> tuple[Derived, _Modules]:
    model = build(kind, small)
    modules = _structure(model)
    inputs = find_inputs(model)
    if _structure(model) != modules:
        return Derived(None, ("it exchanges modules of its own while it runs",)), modules
    probe = Probe(model, inputs, outputs(model, inputs))
    reasons: list[str] = []
    specs = []
    names: Counter[str] = Counter()
    for stack in find_stacks(model):
        specs.append(_stack(probe, stack, names, reasons))
    usable = any(s.attention or s.cross_attention or s.mlp or s.depth_fixed is None for s in specs)
    family = Family((small.model_type,), tuple(specs)) if usable else None
    return Derived(family, tuple(reasons)), modules


def _dense(config: PretrainedConfig) -> PretrainedConfig:
    """The config without what says how its weights are stored."""
    again = rebuilt(config)
    for key in ("quantization_config", "hf_shrink"):
        vars(again).pop(key, None)
    return again


def _structure(model: nn.Module) -> _Modules:
    """Every module's place and class, however many experts there are."""
    return {(re.sub(r"experts\.\d+", "experts.*", name), type(m).__name__) for name, m in model.named_modules()}


def _stack(probe: Probe, stack: BoundStack, names: Counter[str], reasons: list[str]) -> Stack:
    """The stack with everything of it that is verified."""
    name = _name(stack.path, probe.model, names)
    spec = Stack(name, stack.path, None, None, config=_config_path(probe.model, stack.path), found=True, residual=FOUND)
    proposed = [attentions(block.module) for block in stack.blocks]
    for part, cross in (("attention", False), ("cross_attention", True)):
        spec = _with_attention(probe, spec, part, [[f for c, f in found if c is cross] for found in proposed], reasons)
    taken = {path for found in proposed for _, forms in found for f in forms[:1] for path in _paths(f)}
    spec = _with_mlp(probe, spec, [mlps(block.module, taken) for block in stack.blocks], reasons)
    spec = with_depth(probe, spec, len(stack.blocks))
    if spec.depth_fixed is not None:
        reasons.append(f"{name}: {spec.depth_fixed}")
    return dataclasses.replace(spec, cached=_writes_cache(probe, stack))


def _paths(form: Attention) -> tuple[str, ...]:
    return form.query, form.key, form.value, form.output


def _with_attention(
    probe: Probe, spec: Stack, part: str, proposed: list[list[list[Attention]]], reasons: list[str]
) -> Stack:
    """`spec` with the first form of attention that is right, those that most blocks have first."""
    forms = {found[0].query: found for block in proposed for found in block if found}
    common = Counter(found[0].query for block in proposed for found in block if found)
    reason = None
    for query, _ in common.most_common():
        for form in forms[query]:
            found = dataclasses.replace(spec, **{part: form})  # type: ignore[arg-type]
            failed = check_width(probe, found, part)
            if failed is None:
                found = _with_absence(probe, found, part, form)
                return with_heads(probe, found, part, _bound_parts(probe, found, part))
            reason = reason or failed
    if part == "attention":
        reasons.append(f"{spec.name}: {reason or 'no attention with query, key, value and output was found'}")
    return spec


def _with_absence(probe: Probe, spec: Stack, part: str, form: Attention) -> Stack:
    """`spec` with what an attention returns behind its output, or why it cannot be taken out whole."""
    reason = None
    for returns in ((None,), (None, None), ()):
        found = dataclasses.replace(spec, **{part: dataclasses.replace(form, returns=returns)})  # type: ignore[arg-type]
        failed = check_absence(probe, found, part)
        if failed is None:
            return found
        reason = reason or failed
    return dataclasses.replace(spec, **{part: dataclasses.replace(form, whole=reason)})  # type: ignore[arg-type]


def _with_mlp(probe: Probe, spec: Stack, proposed: list[list[Mlp]], reasons: list[str]) -> Stack:
    """`spec` with every form of MLP that is right; a block has the first of them whose paths it has."""
    accepted: list[Mlp] = []
    reason = None
    for form in dict.fromkeys(_Hashable(form) for block in proposed for form in block):
        found = dataclasses.replace(spec, mlp=form.mlp)
        failed = check_width(probe, found, "mlp")
        if failed is None:
            found = dataclasses.replace(
                found, mlp=dataclasses.replace(form.mlp, whole=check_absence(probe, found, "mlp"))
            )
            with_key = with_channels(probe, found, _bound_parts(probe, found, "mlp")).mlp
            assert isinstance(with_key, Mlp)
            accepted.append(with_key)
        reason = reason or failed
    if accepted:
        return dataclasses.replace(spec, mlp=tuple(accepted) if len(accepted) > 1 else accepted[0])
    reasons.append(f"{spec.name}: {reason or 'no two matrices of an MLP were found'}")
    return spec


@dataclass(frozen=True)
class _Hashable:
    """A form by its paths."""

    mlp: Mlp

    def __hash__(self) -> int:
        return hash((self.mlp.up, self.mlp.down, self.mlp.gate))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hashable) and hash(self) == hash(other)


def _bound_parts(probe: Probe, spec: Stack, part: str) -> list[Any]:
    bound = bind_stack(probe.model, spec)
    assert bound is not None
    return [found for _, found in parts_of(bound, part)]


def _name(path: str, model: PreTrainedModel, taken: Counter[str]) -> str:
    """decoder, encoder, text or vision where the path or the model says so; the path where that is taken."""
    words = [word for word in ("decoder", "encoder", "vision", "visual", "text", "language") if word in path]
    alone = "decoder" if model.can_generate() and not model.config.is_encoder_decoder else "encoder"
    name = {"visual": "vision", "language": "text"}.get(words[0], words[0]) if words else alone
    taken[name] += 1
    return name if taken[name] == 1 else path


def _config_path(model: PreTrainedModel, path: str) -> str:
    """The part of the model's config that the modules around a stack read."""
    parts = {id(part): name for name, part in _parts(model.config, "")}
    while path:
        path = path.rpartition(".")[0]
        own = getattr(model.get_submodule(path), "config", None)
        if own is not None and id(own) in parts:
            return parts[id(own)]
    return ""


def _parts(config: PretrainedConfig, path: str) -> list[tuple[str, PretrainedConfig]]:
    found = [(path, config)]
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            found += _parts(value, f"{path}.{name}" if path else name)
    return found


def _writes_cache(probe: Probe, stack: BoundStack) -> bool:
    """Whether the stack's blocks write a KV cache."""
    model = probe.model
    if model.config.is_encoder_decoder:
        encoder = model.get_encoder()
        return not any(module is stack.blocks[0].module for module in encoder.modules())
    return bool(model.can_generate())
