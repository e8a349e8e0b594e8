"""What the dense model says, kept small: what it hands to its output head instead of the logits themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_shrink.calibration.capture import model_inputs
from hf_shrink.calibration.padding import token_mask
from hf_shrink.calibration.predictions import predictions_of
from hf_shrink.calibration.shelf import Shelf
from hf_shrink.calibration.targets import kind_of
from hf_shrink.errors import CalibrationError
from hf_shrink.ops.precision import fast_precision
from hf_shrink.progress import ProgressCallback
from hf_shrink.tuning.divergence import head_divergence, logit_divergence, state_error

CONSTANT = 0.01  # relative: rounding in half precision is less, a cap is more


class Teacher:
    """The dense model's predictions on the calibration batches, and how far another model's are from them.

    With an output head (a matrix over the vocabulary) the targets are the head's inputs, a hundredth of the logits:
    the logits are made again, some rows at a time. Where the model multiplies its logits by a constant, so do we; a
    cap on logits is left out on both sides. Without a head the targets are the model's class logits, or its hidden
    states or embeddings.

    Attributes:
        batches: how many there are.
        unit: what `loss` is in: "KL divergence" (nats a token) or "relative squared error".
    """

    def __init__(
        self, model: PreTrainedModel, batches: Sequence[Mapping[str, Any]], progress: ProgressCallback
    ) -> None:
        self._batches = batches
        self.batches = len(batches)
        self._head = _head_path(model)
        self._shelf = Shelf()
        self._targets: list[Tensor] = []
        self._distribution = False
        self._scale = 1.0
        if self._head is not None:
            head: Any = model.get_submodule(self._head)
            # A copy: transforms change the head in place.
            self._weight, self._bias = head.weight.detach().clone(), _bias(head)
            self._scale = self._found_scale(model)
        for index in range(len(batches)):
            with torch.no_grad():
                rows = self._rows(model, index).float()
            if not torch.isfinite(rows).all():
                raise CalibrationError("NaN or Inf in the dense model's predictions; check the calibration data")
            self._targets.append(rows)
            self._shelf.take(index, [rows])
            progress("reading the dense model", index + 1, len(batches))
        self.unit = "KL divergence" if self._head is not None or self._distribution else "relative squared error"

    def loss(self, model: PreTrainedModel, index: int) -> Tensor:
        """Mean over batch `index`'s rows, a float32 scalar with gradients to the model where they are enabled."""
        self._shelf.give_back(index)
        target = self._targets[index]
        rows = self._rows(model, index)
        if self._head is not None:
            head: Any = model.get_submodule(self._head)
            own, dense = (None if b is None else b * self._scale for b in (_bias(head), self._bias))
            found = head_divergence(rows, target, (head.weight.detach(), own), (self._weight, dense))
        else:
            found = logit_divergence(rows, target) if self._distribution else state_error(rows, target)
        self._shelf.take(index, [target])
        return found

    def _rows(self, model: PreTrainedModel, index: int) -> Tensor:
        """(rows, width): what counts of one batch, without padding; what a head reads, times `_scale`."""
        batch = self._batches[index]
        inputs = model_inputs(model, batch)
        with fast_precision(model.device):
            if self._head is None:
                found = predictions_of(model(**inputs, return_dict=True), batch, kind_of(model), model)
                self._distribution = found.distribution
                return found.values
            with _without_head(model, self._head) as passed:
                model(**inputs)
        hidden = _seen(passed) * self._scale
        mask = token_mask(batch, hidden.shape[:2], model) if hidden.dim() == 3 else None
        return hidden[mask.to(hidden.device)] if mask is not None else hidden.flatten(0, -2)

    def _found_scale(self, model: PreTrainedModel) -> float:
        """By what the model multiplies what its head puts out; 1 where it is no constant."""
        assert self._head is not None
        with torch.no_grad(), _without_head(model, self._head) as passed:
            logits = getattr(model(**model_inputs(model, self._batches[0]), return_dict=True), "logits", None)
        hidden = _seen(passed).float()
        if logits is None or logits.shape != hidden.shape:
            return 1.0
        scale = float((logits.float() * hidden).sum() / hidden.square().sum())
        constant = float((logits.float() - scale * hidden).norm()) <= CONSTANT * abs(scale) * float(hidden.norm())
        return scale if constant and abs(scale - 1) > CONSTANT else 1.0


def _seen(passed: _PassOn) -> Tensor:
    if passed.seen is None:
        raise CalibrationError("the model's forward does not use its output head, so there is nothing to tune by")
    return passed.seen


class _PassOn(nn.Module):
    """Stands where the head is; hands its input on and remembers it."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.weight = head.weight
        self.seen: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        self.seen = hidden
        return hidden


@contextmanager
def _without_head(model: PreTrainedModel, path: str) -> Iterator[_PassOn]:
    """The model without the product with its head, which costs most of a small model's forward."""
    head = model.get_submodule(path)
    stand_in = _PassOn(head)
    model.set_submodule(path, stand_in)
    try:
        yield stand_in
    finally:
        model.set_submodule(path, head)


def _head_path(model: PreTrainedModel) -> str | None:
    head = model.get_output_embeddings()
    return next((path for path, module in model.named_modules() if module is head), None) if head is not None else None


def _bias(head: nn.Module) -> Tensor | None:
    bias = getattr(head, "bias", None)
    return bias.detach() if isinstance(bias, Tensor) else None
