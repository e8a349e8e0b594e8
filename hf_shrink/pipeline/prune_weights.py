"""`prune_weights`: zero the least important weights of any module, without a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from hf_shrink.errors import RecipeError
from hf_shrink.pipeline.masking import Masking
from hf_shrink.pipeline.planning import experts_apart
from hf_shrink.pipeline.weights import choose_weights
from hf_shrink.pruning.base import WEIGHTS
from hf_shrink.pruning.importance import Importance, importance_method
from hf_shrink.sparsity import Amount


@dataclass(frozen=True)
class _Choice:
    """What the caller said, in the form of a prune step."""

    amount: Amount
    targets: tuple[str, ...] | None
    ignore: tuple[str, ...] | None


def prune_weights(
    model: nn.Module,
    importance: str | Importance = "magnitude",
    *,
    threshold: float | None = None,
    sparsity: float | None = None,
    pattern: str | None = None,
    granularity: str = "tensor",
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
) -> dict[str, float]:
    """Zero the weights that matter least, in place: P_new = P \\ {p : f(p) <= tau}.

        prune_weights(model, threshold=0.01)                                        # f(p) = |p|
        prune_weights(model, lambda p: (p * p.grad).abs(), sparsity=0.5, granularity="global")

    Args:
        model: any module; in transformers models the matrices inside the blocks by default, in others every Linear,
            convolution, embedding, recurrent and attention weight.
        importance: f, called with every parameter and returning the importance of each of its elements in the same
            shape; or the name of a method that needs no data.
        threshold: tau. Exactly one of threshold, sparsity (the fraction to zero) and pattern ("2:4": of every 4
            consecutive weights of a row, 2 are kept) is given.
        granularity: within what a sparsity is kept: "tensor", "row" or "global" (all targets together).
        targets, ignore: paths of modules or parameters, "re:" regexes (from the start of the path) or class names.

    Returns:
        The fraction of zeroed weights, by path of the parameter.

    Raises:
        RecipeError: the amount, a target or what `importance` gives is not valid.
        CalibrationError: NaN in the importance, or weights that are not finite.
    """
    for name, value in (("targets", targets), ("ignore", ignore)):
        if isinstance(value, str):
            raise RecipeError(f"{name} is a list, for example [{value!r}]")
    entry = WEIGHTS.get(importance) if isinstance(importance, str) else importance_method(importance)
    if entry.needs_statistics:
        raise RecipeError(f"{importance!r} needs calibration data; use shrink(model, recipe) for it")
    try:
        method = entry(granularity=granularity)  # type: ignore[call-arg]
    except ValueError as error:
        raise RecipeError(str(error)) from error
    choice = _Choice(
        Amount(sparsity, threshold, pattern),
        None if targets is None else tuple(targets),
        None if ignore is None else tuple(ignore),
    )
    with experts_apart(model) as binding:
        chosen = choose_weights(model, binding, choice, method)
        masking = Masking(model, method, chosen.amounts, refit=False)
        masking.without_matrices()
        masking.matrices(dict.fromkeys(masking.modules))
    return masking.sparsities
