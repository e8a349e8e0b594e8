"""Which weights a step zeroes some of, and how many of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_shrink.architectures.binding import Binding
from hf_shrink.architectures.matching import class_of, matches
from hf_shrink.architectures.weights import WeightRef, weight_refs
from hf_shrink.errors import RecipeError
from hf_shrink.ops.masks import shared_counts, whole
from hf_shrink.pipeline.patterns import check_patterns
from hf_shrink.pipeline.targets import spared_by_default
from hf_shrink.pruning.base import WeightsMethod, WeightView
from hf_shrink.sparsity import Amount


class Choice(Protocol):
    """What a step says about which weights it means and how many of them go: `PruneStep`, or a caller's own."""

    @property
    def targets(self) -> tuple[str, ...] | None: ...
    @property
    def ignore(self) -> tuple[str, ...] | None: ...
    @property
    def amount(self) -> Amount: ...


@dataclass(frozen=True)
class ChosenWeights:
    """Amounts by path of the parameter, in the model's order, and what the user should know about them."""

    amounts: dict[str, Amount]
    notes: tuple[str, ...]


def choose_weights(
    model: nn.Module,
    binding: Binding | None,
    step: Choice,
    method: WeightsMethod,
    gone: Callable[[str], bool] = lambda path: False,
    narrowed: Mapping[str, int] | None = None,
) -> ChosenWeights:
    """Every weight that a step zeroes some of.

    Without `targets`: in transformers models every matrix inside the blocks, in other modules every Linear,
    convolution, embedding, recurrent and attention weight. Without `ignore`: in transformers models not what a quantize
    step leaves alone either (head, task heads, routers, tied weights). Targets may also be paths of parameters
    ("lstm.weight_hh_l0").

    Args:
        model: its experts taken apart.
        gone: whether a module is removed before weights are zeroed.
        narrowed: input widths, by path, of matrices that lose inputs before.

    Raises:
        RecipeError: nothing is left, or a weight that was named cannot be pruned so.
    """
    refs = list(weight_refs(model))
    patterns = {"targets": step.targets or (), "ignore": step.ignore or ()}
    owners = {ref.module_path: ref.owner for ref in refs}
    unmatched = check_patterns("prune", patterns, model, owners, lambda t: any(_means(ref, t) for ref in refs))
    chosen: list[WeightRef] = []
    unfit: dict[str, list[str]] = {}
    for ref in _selected(model, binding, step, refs):
        if gone(ref.module_path):
            continue
        reason = _unfit(ref, step.amount, method, (narrowed or {}).get(ref.module_path, ref.width))
        if reason is None:
            chosen.append(ref)
        elif any(_means(ref, target) and target != class_of(ref.owner) for target in step.targets or ()):
            raise RecipeError(f"{ref.path} cannot be pruned so: {reason}; take it out of prune.targets")
        else:
            unfit.setdefault(reason, []).append(ref.path)
    if not chosen:
        why = f": {next(iter(unfit))}" if unfit else ""
        raise RecipeError(f"the prune step finds no weight to prune{why}; see `hf-shrink inspect` for the module paths")
    notes = tuple(
        f"{paths[0]}{f' and {len(paths) - 1} more' if len(paths) > 1 else ''} stay dense: {reason}"
        for reason, paths in unfit.items()
    )
    return ChosenWeights(_amounts(chosen, step.amount, method), (*unmatched, *notes))


def view_of(ref: WeightRef, amount: Amount, rows: Tensor | None = None) -> WeightView:
    """What a method sees of a weight; `rows` in place of its own values where they were changed."""
    if rows is None:
        rows = ref.as_rows(ref.parameter.detach().float()).clone()
    return WeightView(rows, ref.parameter, ref.as_rows, amount)


def _selected(
    model: nn.Module, binding: Binding | None, step: Choice, refs: Sequence[WeightRef]
) -> Iterator[WeightRef]:
    modules = {ref.module_path: ref.owner for ref in refs}
    stock = binding is not None and isinstance(model, PreTrainedModel)
    inside = {path for block in binding.blocks for path in block.roles} if binding is not None else set(modules)
    spared: set[str] = set()
    if stock and step.ignore is None:
        spared = spared_by_default(model, binding, modules, inside, step.targets or ())
    for ref in refs:
        if any(_means(ref, target) for target in step.ignore or ()) or ref.module_path in spared:
            continue
        if ref.module_path in inside if step.targets is None else any(_means(ref, t) for t in step.targets):
            yield ref


def _means(ref: WeightRef, target: str) -> bool:
    return matches(ref.module_path, ref.owner, target) or matches(ref.path, ref.owner, target)


def unfit(amount: Amount, width: int) -> str | None:
    """Why an amount does not go with so many consecutive columns; None when it does."""
    if amount.pattern is not None and width % amount.numbers[1]:
        return f"{amount.pattern} does not divide rows of {width} weights"
    return None


def _unfit(ref: WeightRef, amount: Amount, method: WeightsMethod, width: int) -> str | None:
    """Why a weight cannot be pruned so; None when it can."""
    if method.needs_statistics and not ref.is_matrix:
        return "the method needs second moments of the inputs, which only Linears have; use magnitude"
    return unfit(amount, width)


def _amounts(refs: Sequence[WeightRef], amount: Amount, method: WeightsMethod) -> dict[str, Amount]:
    """The amount for every weight; under granularity "global" each has its share of the least important ones of all."""
    if amount.sparsity is None or getattr(method, "granularity", None) != "global":
        return {ref.path: amount for ref in refs}
    sizes = [ref.parameter.numel() for ref in refs]

    def saliencies() -> Iterator[Tensor]:
        for ref in refs:
            yield method.saliency(view_of(ref, amount), None)  # type: ignore[attr-defined]

    counts = shared_counts(saliencies, whole(amount.sparsity * sum(sizes)))
    return {ref.path: Amount(count / size) for ref, count, size in zip(refs, counts, sizes, strict=True)}
