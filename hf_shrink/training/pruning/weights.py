"""Single weights that go gradually while a model is trained: unstructured, or N of every M kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_shrink.architectures.binding import bind
from hf_shrink.architectures.weights import WeightRef, weight_refs
from hf_shrink.checkpoint.record import ShrinkRecord
from hf_shrink.errors import ArchitectureError, RecipeError
from hf_shrink.ops.masks import pruned, smallest, whole
from hf_shrink.pipeline.masking import HONEST_NOTE
from hf_shrink.pipeline.weights import ChosenWeights, choose_weights, view_of
from hf_shrink.plan import WeightsPlan
from hf_shrink.pruning.base import WEIGHTS
from hf_shrink.pruning.importance import importance_method
from hf_shrink.pruning.saliency import SaliencyMethod
from hf_shrink.pruning.zeros import ZeroKeeper
from hf_shrink.recipe import PruneStep
from hf_shrink.registry import did_you_mean
from hf_shrink.sparsity import Amount
from hf_shrink.training.pruning.scoring import SCORES, TrainingScore
from hf_shrink.training.pruning.zeros import check_no_adapters, check_whole
from hf_shrink.training.schedule import Window


class GradualWeights:
    """A `Part`: `prune: {what: weights}`.

    What goes in the end is chosen anew before every change of the masks; of that, the least important goes now, as much
    of it as the schedule has come to. What is zero stays zero.

    With a score of training, the mask of a weight is the weight itself: its gradient is w * dL/dw of an optimizer step.
    """

    adds_parameters: ClassVar[bool] = False

    def __init__(self, step: PruneStep) -> None:
        """Raises RecipeError for a method or an option that training does not know."""
        self._step = step
        self._scores: dict[str, Tensor] = {}  # by path of the parameter, in its shape
        self._paths: dict[int, str] = {}  # of parameters, by their identity
        self._score, self._method = self._methods(step)
        self._keeper: ZeroKeeper | None = None

    def attach(self, model: PreTrainedModel) -> None:
        check_no_adapters(model)
        self._model = model
        self._all = sum(parameter.numel() for parameter in model.parameters())  # a quantize step adds its own
        if mixed := [block.path for block in bind(model).blocks if block.experts is not None]:
            raise ArchitectureError(
                f"{mixed[0]} is a mixture of experts, whose single weights cannot be pruned in training; run `shrink` "
                "with this step, and keep the zeros with ShrinkCallback()"
            )
        self._refs = {ref.path: ref for ref in weight_refs(model)}
        self._paths = {id(ref.parameter): path for path, ref in self._refs.items()}
        chosen = self._chosen()  # raises what the end would raise
        self._refs = {path: self._refs[path] for path in chosen.amounts}

    def attach_copy(self, model: PreTrainedModel) -> None:
        pass

    def begin(self, model: PreTrainedModel, window: Window) -> None:
        check_whole(model)
        if self._score is not None:
            _check_trained(self._step.method, self._refs)
        self._window = window
        self._changed = 0.0
        self._paths = {id(ref.parameter): path for path, ref in self._refs.items()}
        if self._score is not None:
            self._scores = {p: torch.zeros_like(ref.parameter, dtype=torch.float32) for p, ref in self._refs.items()}
        if self._keeper is not None:
            self._keeper.close()
        self._keeper = ZeroKeeper(model)

    def settled(self, window: Window) -> int:
        return window.end

    def before_optimizer_step(self, step: int, scale: float) -> None:
        if self._score is None or step > self._window.end:
            return
        for path, ref in self._refs.items():
            gradient = ref.parameter.grad
            if gradient is not None and bool(torch.isfinite(gradient).all()):
                product = (ref.parameter.detach().float() * gradient.float()).reshape(1, -1)
                found = self._score.of(product).view_as(self._scores[path])
                self._scores[path] = self._score.updated(self._scores[path], found)

    def after_step(self, step: int) -> None:
        if not self._window.due(step):
            return
        assert self._keeper is not None
        fraction, changed, total = self._window.progress(step), 0, 0
        for path, amount in self._chosen().amounts.items():
            ref = self._refs[path]
            view = view_of(ref, amount)
            before = view.rows == 0
            saliency = self._method.saliency(view, None).masked_fill(before, -torch.inf)
            gone = _least(saliency, pruned(saliency, amount, self._method.granularity == "row"), fraction)
            changed, total = changed + int((gone & ~before).sum()), total + gone.numel()
            ref.write(view.rows.masked_fill(gone, 0.0))
        self._changed = changed / total
        self._keeper.update(self._refs)
        if step == self._window.end:
            self._scores = {}

    def finish(self, model: PreTrainedModel, record: ShrinkRecord) -> None:
        assert self._keeper is not None
        self._keeper.close()
        zeros = {path: float((ref.parameter == 0).float().mean()) for path, ref in self._refs.items()}
        pattern = self._step.amount.pattern
        amounts = {path: Amount(found) if pattern is None else Amount(pattern=pattern) for path, found in zeros.items()}
        weights = WeightsPlan(self._step.method, amounts, dict(self._step.options), refit=False)
        record.plan = replace(record.plan, weights=weights)
        figures = self.figures()
        record.report.notes += [
            f"{100 * figures['sparsity']:.2f}% of the weights in {len(zeros)} matrices are zero",
            HONEST_NOTE,
            *self._chosen().notes,
        ]

    def tensors(self) -> dict[str, Tensor]:
        return {"changed": torch.tensor(self._changed, dtype=torch.float64), **self._scores}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """The masks are the zeros of the weights, which the checkpoint has."""
        self._changed = float(tensors["changed"])
        self._scores = {
            path: tensors[path].to(ref.parameter.device) for path, ref in self._refs.items() if path in tensors
        }
        assert self._keeper is not None
        self._keeper.update(self._refs)  # also where pruning has emptied a matrix

    def figures(self) -> dict[str, float]:
        """The fraction of the chosen weights that is zero, how many of the model's parameters are not one of these
        zeros, and the fraction of the chosen weights that the last change of the masks took."""
        zeros = sum(int((ref.parameter == 0).sum()) for ref in self._refs.values())
        total = sum(ref.parameter.numel() for ref in self._refs.values())
        return {"sparsity": zeros / total, "parameters": float(self._all - zeros), "mask_churn": self._changed}

    def _chosen(self) -> ChosenWeights:
        return choose_weights(self._model, bind(self._model), self._step, self._method)

    def _methods(self, step: PruneStep) -> tuple[TrainingScore | None, SaliencyMethod]:
        """The score of training, if it is one, and what tells the importance of every weight."""
        if step.method in SCORES.names():
            options = dict(step.options)
            granularity = options.pop("granularity", "tensor")
            try:
                method = importance_method(self._costs)(granularity=granularity)
            except ValueError as error:
                raise RecipeError(f"{step.method}: {error}") from error
            return SCORES.build(step.method, options, ("granularity",)), method
        without_data = [name for name in WEIGHTS.names() if not WEIGHTS.get(name).needs_statistics]
        if step.method not in without_data:
            known = [*SCORES.names(), *without_data]
            raise RecipeError(
                f"training has no method {step.method!r} that prunes single weights, or it needs calibration data; "
                f"{did_you_mean(step.method, known)}"
            )
        found = WEIGHTS.build(step.method, step.options)
        assert isinstance(found, SaliencyMethod)
        return None, found

    def _costs(self, parameter: Tensor) -> Tensor:
        """By the score: of weights that are zero the least, so that they stay zero."""
        assert self._score is not None
        path = self._paths[id(parameter)]
        score = self._scores.get(path)
        costs = torch.zeros_like(parameter) if score is None else self._score.costs(score)
        return costs.masked_fill(parameter.detach() == 0, -torch.inf)


def _check_trained(method: str, refs: Mapping[str, WeightRef]) -> None:
    """Raises RecipeError for a matrix without gradients, of which a score of training would know nothing."""
    frozen = next((path for path, ref in refs.items() if not ref.parameter.requires_grad), None)
    if frozen is not None:
        raise RecipeError(
            f"{method} looks at gradients, and {frozen} has none (requires_grad is False); let it be trained, leave "
            "frozen modules out of the step (ignore or targets), or use magnitude"
        )


def _least(saliency: Tensor, chosen: Tensor, fraction: float) -> Tensor:
    """bool, the fraction of the chosen weights that matters least."""
    among = saliency.masked_fill(~chosen, torch.inf)
    count = whole(fraction * int(chosen.sum()))
    return smallest(among.reshape(1, -1), count).view(saliency.shape)
