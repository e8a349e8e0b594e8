"""Which weights a quantize step touches, and the scheme of each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_shrink.architectures.binding import Binding
from hf_shrink.architectures.linears import is_matrix
from hf_shrink.architectures.matching import class_of, matches
from hf_shrink.checkpoint.experts import read_with_experts
from hf_shrink.checkpoint.portability import needs_dequantize, portability
from hf_shrink.errors import RecipeError
from hf_shrink.pipeline.patterns import check_patterns
from hf_shrink.pipeline.tied import agree_on_ties, head_paths, keep_ties, weight_holders
from hf_shrink.plan import Scheme
from hf_shrink.recipe import QuantizeStep

_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class Resolved:
    """Schemes by module path, in the model's order, and what the user should know about them."""

    schemes: dict[str, Scheme]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Selected:
    """The weights that a quantize step means.

    Attributes:
        paths: of the modules, in the model's order; for each the key of the override that it falls under, or None.
        named: those that were asked for by path or regex, not by class or default.
        head: the output head and what is tied to it, where the step has a scheme for them.
        notes: what the user should know.
    """

    paths: dict[str, str | None]
    named: frozenset[str]
    notes: list[str]
    head: frozenset[str] = frozenset()


def resolve_schemes(
    model: nn.Module,
    binding: Binding | None,
    step: QuantizeStep,
    portable: bool,
    narrowed: Mapping[str, int] | None = None,
) -> Resolved:
    """The scheme of every weight that the step quantizes.

    Without `targets`: every matrix inside the blocks, not those of towers in front of them. Without `ignore`: not the
    output head, task heads, routers and tied weights, unless an override names them; towers and what lies between them
    and the blocks only where an override names them, or a path or regex of `targets` that names no matrix of the
    blocks. The path of a module that holds others means what is inside it; of an override, where that has matrices of
    the blocks, only these, and none that are left alone by default. A path wins over those of modules around it, the
    nearest first, these over regexes in their written order, those over class names. Tied weights that are both chosen
    get one scheme.

    Args:
        narrowed: input widths, by path, of matrices that lose inputs before they are quantized.

    Raises:
        RecipeError: nothing is left to quantize, a target or override matches nothing, or `portable` cannot be kept.
    """
    selected = select(model, binding, step)
    notes = selected.notes
    chosen = asked_schemes(model, step, selected)
    check_inputs(model, chosen)
    widths = {path: width_of(model.get_submodule(path)) for path in chosen} | dict(narrowed or {})
    schemes = {path: scheme.for_width(widths[path]) for path, scheme in chosen.items()}
    if portable and isinstance(model, PreTrainedModel):
        experts = read_with_experts(model, schemes)
        schemes |= _one_group_size({path: schemes[path] for path in experts}, widths, "experts", notes)
        if needs_dequantize(model, schemes):
            schemes = _one_group_size(schemes, widths, "weights of this kind", notes)
        if reasons := portability(model, schemes, {}):
            raise RecipeError(
                f"not portable: {'; '.join(reasons)}. {_one_scheme(model, schemes)} portable: false "
                "(--set portable=false): the result then loads after `import hf_shrink`"
            )
    notes[:0] = group_notes(chosen, schemes)
    return Resolved(schemes, tuple(notes))


def asked_schemes(model: nn.Module, step: QuantizeStep, selected: Selected) -> dict[str, Scheme]:
    """What the step asks for of every selected weight, whether it can be had or not."""
    chosen = {
        path: step.base_scheme() if key is None else step.scheme_with(step.overrides[key])
        for path, key in selected.paths.items()
    }
    chosen |= {path: step.head_scheme() for path in selected.head}
    return agree_on_ties(model, chosen)


def _one_scheme(model: PreTrainedModel, schemes: Mapping[str, Scheme]) -> str:
    """The start of a remedy: one of the schemes for all weights, where stock loads that, or what comes next alone."""
    alone = (s for s in dict.fromkeys(schemes.values()) if not portability(model, dict.fromkeys(schemes, s), {}))
    helps = next(alone, None)
    return "Set" if helps is None else f"Use one scheme for all, such as {helps.name}, or set"


def check_inputs(model: nn.Module, schemes: Mapping[str, Scheme]) -> None:
    """Raises RecipeError where a scheme rounds the input of an embedding, which is indices."""
    for path, module in model.named_modules():
        scheme = schemes.get(path)
        if scheme is not None and scheme.activation_bits < 16 and isinstance(module, nn.Embedding):
            raise RecipeError(
                f"{path} is an embedding: its input is indices, which {scheme.name} cannot round. Take it out of "
                "targets, or override it (and a head tied to it) with W8A16 or FP8A16, and set portable: false"
            )


def select(model: nn.Module, binding: Binding | None, step: QuantizeStep) -> Selected:
    """The weights that the step's targets, ignore and overrides mean, as `resolve_schemes` says.

    Raises:
        RecipeError: none is left, or a pattern is not valid or matches nothing.
    """
    # Subclasses of Embedding compute something of their own (a scale, positions), which a packed one would lose.
    weights = {p: m for p, m in model.named_modules() if p and (is_matrix(m) or type(m) is nn.Embedding)}
    unusual = {p: m for p, m in model.named_modules() if isinstance(m, nn.Embedding) and p not in weights}
    patterns = {"targets": step.targets or (), "overrides": step.overrides, "ignore": step.ignore or ()}

    def means(pattern: str) -> bool:
        is_kind = pattern == nn.Embedding.__name__ and bool(unusual)
        return is_kind or any(matches(path, module, pattern) for path, module in weights.items())

    unmatched = check_patterns("quantize", patterns, model, weights, means)
    candidates = weights
    if binding is not None and binding.towers and isinstance(model, PreTrainedModel):
        # A regex that names a tower means its matrices, not its table of positions.
        candidates = {p: m for p, m in candidates.items() if is_matrix(m) or m is model.get_input_embeddings()}
    inside = {path for block in binding.blocks for path in block.roles} if binding is not None else set(candidates)
    before_text = _outside_text(model, binding, candidates, inside)
    spared = spared_by_default(model, binding, candidates, inside, step.targets or ()) if step.ignore is None else set()
    head = head_paths(model, candidates) if step.head is not None else frozenset()
    chosen: dict[str, str | None] = {}
    by_name: set[str] = set()
    blocks = {path: candidates[path] for path in inside & candidates.keys()}
    apart = {key for key in step.overrides if not any(matches(p, m, key) for p, m in blocks.items())}
    for path, module in candidates.items():
        if path in head:
            chosen[path] = None
            continue
        override = _override(path, module, step.overrides)
        named = override is not None and override != class_of(module)
        if path.startswith(f"{override}.") and override not in apart:
            named = path in inside and path not in spared  # what is around blocks says nothing of head and routers
        if step.ignore is not None and any(matches(path, module, t) for t in step.ignore):
            continue
        wanted = path in inside if step.targets is None else any(matches(path, module, t) for t in step.targets)
        if not (named or (wanted and path not in spared)):
            continue
        chosen[path] = override
        if named or any(t != class_of(module) and matches(path, module, t) for t in step.targets or ()):
            by_name.add(path)
    notes = unmatched + keep_ties(model, chosen, by_name) + _unknown_experts(binding, step)
    if left := [p for p in before_text & spared if any(matches(p, candidates[p], t) for t in step.targets or ())]:
        notes.append(
            f"{min(left)} and what else of the image side the targets match stays as it is, because they mean the text "
            "blocks too; to quantize it, add a target that matches nothing else"
        )
    if unusual and nn.Embedding.__name__ in (step.targets or ()):
        path, module = next(iter(unusual.items()))
        notes.append(
            f"{path} stays dense: its class, {type(module).__name__}, computes something of its own, which a packed "
            "embedding would lose"
        )
    if not chosen:
        raise RecipeError("the quantize step matches no weight; see `hf-shrink inspect` for the module paths")
    notes += [
        f"quantize.targets: {t!r} adds nothing: what it matches is left out (see quantize.ignore) or cannot be packed"
        for t in step.targets or ()
        if not any(matches(path, candidates[path], t) for path in chosen)
    ]
    notes += [
        f"quantize.overrides: {key!r} changes nothing: what it matches stays dense, or goes by head or another override"
        for key in step.overrides
        if key not in chosen.values()
    ]
    return Selected(chosen, frozenset(by_name & chosen.keys()), notes, head & chosen.keys())


def width_of(module: nn.Module) -> int:
    if isinstance(module, nn.Embedding):
        return module.embedding_dim
    return module.nx if isinstance(module, Conv1D) else int(module.in_features)  # type: ignore[arg-type]


def _override(path: str, module: nn.Module, overrides: Mapping[str, object]) -> str | None:
    """The most specific override's key: path, the nearest module's around it, the first regex, then the class name."""
    around = path
    while around:
        if around in overrides:
            return around
        around = around.rpartition(".")[0]
    for key in overrides:
        if key.startswith("re:") and matches(path, module, key):
            return key
    return class_of(module) if class_of(module) in overrides else None


def spared_by_default(
    model: nn.Module,
    binding: Binding | None,
    candidates: Mapping[str, nn.Module],
    inside: set[str],
    targets: Iterable[str],
) -> set[str]:
    """The default `ignore`, without what `targets` name outside the blocks and nothing inside (towers, projectors)."""
    apart = _named_apart(model, _outside_text(model, binding, candidates, inside), inside, targets)
    return _spared(model, binding, candidates, inside) - apart


def _spared(
    model: nn.Module, binding: Binding | None, candidates: Mapping[str, nn.Module], inside: set[str]
) -> set[str]:
    """The default `ignore`: output head, task heads (any matrix outside the blocks), routers, tied weights."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    config = getattr(model, "config", None)
    routers = {path for block in binding.blocks for path in block.routers} if binding is not None else set()
    # Without a table of roles: what has as many outputs as there are experts.
    known = binding is not None and binding.family is not None
    experts = set() if known else {getattr(config, key, None) for key in _EXPERT_COUNTS} - {None}
    spared = {path for paths in weight_holders(model).values() if len(paths) > 1 for path in paths}
    for path, module in candidates.items():
        outside = path not in inside and is_matrix(module)
        router = path in routers or (is_matrix(module) and getattr(module, "out_features", None) in experts)
        if module is head or router or (outside and isinstance(model, PreTrainedModel)):
            spared.add(path)
    return spared


def _unknown_experts(binding: Binding | None, step: QuantizeStep) -> list[str]:
    """Matrices in 3D parameters that no table says how to take apart stay as they are: say so."""
    if binding is None or step.targets is not None:
        return []
    stacked = [
        f"{block.path}.{path}.{name}"
        for block in binding.blocks
        for path, module in block.module.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and not type(module).__module__.startswith("torch.")  # a convolution's
    ]
    if not stacked:
        return []
    return [f"{stacked[0]} and its like stay dense: matrices in 3D parameters that nothing says how to take apart"]


def _outside_text(model: nn.Module, binding: Binding | None, candidates: Iterable[str], inside: set[str]) -> set[str]:
    """The matrices of towers and of what lies between them and the blocks; none where the model has no towers."""
    if binding is None or not binding.towers or not isinstance(model, PreTrainedModel):
        return set()
    modules = {path: model.get_submodule(path) for path in candidates if path not in inside}
    return {p for p, module in modules.items() if is_matrix(module) and module is not model.get_output_embeddings()}


def _named_apart(model: nn.Module, paths: set[str], inside: set[str], targets: Iterable[str]) -> set[str]:
    """Those of `paths` that a target names which names nothing `inside`."""
    modules = {path: model.get_submodule(path) for path in paths | inside}
    apart = [t for t in targets if not any(matches(path, modules[path], t) for path in inside)]
    return {path for path in paths if any(matches(path, modules[path], t) for t in apart)}


def _one_group_size(
    schemes: dict[str, Scheme], widths: Mapping[str, int], what: str, notes: list[str]
) -> dict[str, Scheme]:
    """Agree on a group size where that is all in which the schemes differ: stock reads these weights only so."""
    kinds = {replace(s, group_size=None if s.group_size is None else 1) for s in schemes.values()}
    sizes = {s.group_size for s in schemes.values()}
    if len(kinds) != 1 or len(sizes) == 1:
        return schemes
    common = math.gcd(*(widths[p] for p in schemes))
    smallest = min(s for s in sizes if s is not None)
    size = max(d for d in range(1, smallest + 1) if common % d == 0)
    notes.append(f"one group size, {size}, for all {what}: stock transformers loads them only so")
    return {path: replace(scheme, group_size=size) for path, scheme in schemes.items()}


def group_notes(asked: Mapping[str, Scheme], got: Mapping[str, Scheme]) -> Iterable[str]:
    changed: dict[tuple[int | None, int | None], int] = {}
    for path, scheme in got.items():
        if scheme.group_size != asked[path].group_size:
            key = (asked[path].group_size, scheme.group_size)
            changed[key] = changed.get(key, 0) + 1
    for (old, new), count in changed.items():
        fast = "" if new in (32, 64, 128, 256) else "; no fast kernel takes that size"
        yield f"group size {old} does not divide the width of {count} weights; they use {new}{fast}"
