"""Carry out a plan's zeros: choose each mask when its matrix is reached, refit what is kept, and keep the books."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from hf_shrink.architectures.matching import class_of
from hf_shrink.architectures.weights import WeightRef, weight_refs
from hf_shrink.calibration.statistics import InputStatistics
from hf_shrink.errors import CalibrationError, RecipeError
from hf_shrink.ops.linalg import damped
from hf_shrink.ops.masks import refit_kept
from hf_shrink.pipeline.kept import KeptStack, present
from hf_shrink.pipeline.tied import weight_holders
from hf_shrink.pipeline.weights import unfit, view_of
from hf_shrink.pruning.base import WEIGHTS, Masked, WeightsMethod, WeightView
from hf_shrink.quantization.drift import corrected
from hf_shrink.sparsity import Amount, WeightsPlan

REFIT_STEPS = 20
DAMPING = 0.01
Statistics = Mapping[str, InputStatistics | None]


@dataclass
class Masking:
    """Zeroes single weights of a model, wherever the walk has come to.

    Attributes:
        amounts: by present path of the parameter.
        refit: refit what is kept by least squares, where there are statistics; the target are then the dense
            model's outputs on the compressed model's inputs, where the dense model is followed.
        zeroed: by kind of module: how many weights of it were zeroed, and their zeros and elements.
        sparsities: the fraction that was zeroed, by path of the parameter.
        without_data: paths of the parameters whose zeros were chosen by magnitude, for want of statistics.
    """

    model: nn.Module
    method: WeightsMethod
    amounts: Mapping[str, Amount]
    refit: bool
    zeroed: dict[str, list[int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    sparsities: dict[str, float] = field(default_factory=dict)
    without_data: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        refs = {ref.path: ref for ref in weight_refs(self.model) if ref.path in self.amounts}
        for path in self.amounts:
            if path not in refs:
                raise RecipeError(f"the plan zeroes weights of {path}, which this model does not have; make it anew")
        # Paths of the matrices that get zeros, in the model's order; and of all modules that hold such a weight.
        self.modules = [ref.module_path for ref in refs.values() if ref.is_matrix]
        ids = {id(ref.parameter) for ref in refs.values()}
        self.holders = {p for found, paths in weight_holders(self.model).items() if found in ids for p in paths}

    @classmethod
    def begin(
        cls, model: nn.Module, plan: WeightsPlan | None, method: WeightsMethod | None, stacks: Sequence[KeptStack]
    ) -> Masking | None:
        """For a model that has lost its blocks, all that is no Linear's zeroed; None where the plan has no zeros."""
        if plan is None or method is None:
            return None
        masking = cls(model, method, present(plan.amounts, stacks), plan.refit)
        masking.without_matrices()
        return masking

    @property
    def needs_statistics(self) -> bool:
        """Of the matrices' inputs."""
        return self.method.needs_statistics

    @property
    def follows_dense(self) -> bool:
        """Whether statistics should have a drift."""
        return self.refit

    def without_matrices(self) -> None:
        """Zero what is no Linear's, for which there are no statistics: before anything runs."""
        for ref in list(weight_refs(self.model)):
            if ref.path in self.amounts and not ref.is_matrix:
                self._apply([ref], None)

    def matrices(self, statistics: Statistics) -> Statistics:
        """Zero those of the matrices at the paths of `statistics` that the plan names.

        Returns:
            The statistics for what comes next. Where a weight was refitted to the dense outputs, its drift is settled.
        """
        settled = dict(statistics)
        groups: dict[object, list[WeightRef]] = {}
        for path, found in statistics.items():
            ref = WeightRef(path, self.model.get_submodule(path), "weight")
            if ref.path in self.amounts and ref.path not in self.sparsities:
                groups.setdefault(path if found is None else id(found), []).append(ref)
        for refs in groups.values():
            found = statistics[refs[0].module_path]
            self._apply(refs, found)
            if found is not None:
                without = replace(found, drift=None)
                settled.update((ref.module_path, without) for ref in refs)
        return settled

    def _apply(self, refs: Sequence[WeightRef], statistics: InputStatistics | None) -> None:
        """Zero weights that read the same input."""
        method = self.method
        if method.needs_statistics and statistics is None:
            method = WEIGHTS.build("magnitude", {"granularity": "row"})
            self.without_data += [ref.path for ref in refs]
        views = [view_of(ref, self.amounts[ref.path]) for ref in refs]
        for ref, view in zip(refs, views, strict=True):
            if reason := unfit(view.amount, ref.width):
                raise RecipeError(f"{ref.path} cannot be pruned as planned: {reason}; make the plan anew")
            if not torch.isfinite(view.rows).all():
                raise CalibrationError(f"NaN or Inf in {ref.path}; the checkpoint is damaged")
        if self.refit and statistics is not None:
            found = _refitted(method, views, statistics)
        else:
            found = method.prune(views, statistics)
        for ref, masked in zip(refs, found, strict=True):
            ref.write(masked.rows)
            elements = masked.kept.numel()
            zeros = elements - int(masked.kept.sum())
            self.sparsities[ref.path] = zeros / elements
            entry = self.zeroed.setdefault(class_of(ref.owner), [0, 0, 0])
            for place, count in enumerate((1, zeros, elements)):
                entry[place] += count
            self.notes += [f"{ref.path}: {note}" for note in masked.notes]

    def report(self) -> list[str]:
        """Notes: the sparsity reached by kind of module, what the zeros are good for, and what happened on the way."""
        lines = [
            f"{kind}: {100 * zeros / elements:.2f}% of {elements:,} weights in {count} matrices are zero"
            for kind, (count, zeros, elements) in self.zeroed.items()
        ]
        if self.without_data:
            first, *others = self.without_data
            one = f"{first} and {len(others)} more have" if others else f"{first} has"
            lines.append(f"{one} no statistics, so that zeros were chosen by magnitude")
        return [*lines, HONEST_NOTE, *self.notes]


HONEST_NOTE = (
    "zeros are stored like any other weight: neither bytes on disk nor speed change by them, and stock transformers "
    "loads them (compressed-tensors' formats for zeros are not offered: it no longer reads them since 0.15)"
)


def _refitted(method: WeightsMethod, views: Sequence[WeightView], statistics: InputStatistics) -> list[Masked]:
    """What a method makes of weights, each then refitted to the outputs that the dense model gives.

    A method that changes weights starts from those corrected for the drift of the inputs. Others choose by the weights
    as they are, so that a threshold means what it says.
    """
    targets = [corrected(view.rows, statistics)[0] for view in views]
    if getattr(method, "changes_weights", False):
        views = [replace(view, rows=target.clone()) for view, target in zip(views, targets, strict=True)]
    pruned = method.prune(views, statistics)
    hessian = statistics.hessian.to(targets[0])
    with damped(hessian, DAMPING):
        return [
            replace(masked, rows=refit_kept(target, masked.rows, masked.kept, hessian, REFIT_STEPS))
            for target, masked in zip(targets, pruned, strict=True)
        ]
