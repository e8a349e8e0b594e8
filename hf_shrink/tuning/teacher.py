"""What the dense model says, kept small: what it hands to its output head instead of the logits themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_shrink.calibration.capture import model_inputs
from hf_shrink.calibration.precision import fast_products
from hf_shrink.calibration.predictions import predictions_of, real_rows
from hf_shrink.calibration.shelf import Shelf
from hf_shrink.calibration.targets import cut_by_rows, kind_of
from hf_shrink.errors import CalibrationError
from hf_shrink.progress import ProgressCallback
from hf_shrink.tuning.divergence import head_divergence, logit_divergence, state_error

CONSTANT = 0.01  # relative: rounding in half precision is less, a cap is more
LOOKED_AT = 256  # rows that show what becomes of what a head puts out
_NOTHING: tuple[float, Tensor | None] = (1.0, None)


class Teacher:
    """The dense model's predictions on the calibration batches, and how far another model's are from them.

    With an output head (a matrix over the vocabulary) the targets are the head's inputs, a hundredth of the logits:
    the logits are made again, some rows at a time. Where the model multiplies what its head puts out by a constant, or
    adds the same to every row, so do we; a cap on logits is left out on both sides. Without a head the targets are the
    model's class logits, or its hidden states or embeddings.

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
        self._scale, self._shift = _NOTHING
        if self._head is not None:
            head: Any = model.get_submodule(self._head)
            # A copy: transforms change the head in place.
            self._weight, self._bias = head.weight.detach().clone(), _bias(head)
            self._scale, self._shift = _behind_head(model, self._head, batches[0])
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
            own, dense = self._added(_bias(head)), self._added(self._bias)
            found = head_divergence(rows, target, (head.weight.detach(), own), (self._weight, dense))
        else:
            found = logit_divergence(rows, target) if self._distribution else state_error(rows, target)
        self._shelf.take(index, [target])
        return found

    def _rows(self, model: PreTrainedModel, index: int) -> Tensor:
        """(rows, width): what counts of one batch, without padding; what a head reads, times `_scale`."""
        batch = self._batches[index]
        inputs = model_inputs(model, batch)
        with fast_products(model):
            if self._head is None:
                found = predictions_of(model(**inputs, return_dict=True), batch, kind_of(model), model)
                self._distribution = found.distribution
                return found.values
            hidden = _head_input(model, self._head, inputs) * self._scale
        return real_rows(hidden, batch, model)

    def _added(self, bias: Tensor | None) -> Tensor | None:
        """(classes,) what is added to the products of `_rows` with a head's weight; None where that is nothing."""
        scaled = None if bias is None else bias * self._scale
        if self._shift is None or scaled is None:
            return scaled if self._shift is None else self._shift
        return scaled + self._shift


def _behind_head(model: PreTrainedModel, path: str, batch: Mapping[str, Any]) -> tuple[float, Tensor | None]:
    """What the model makes of what its head puts out: the number by which it multiplies it, or else the (classes,) that
    it adds to every row. `_NOTHING` where it does neither, or what is neither."""
    row = cut_by_rows(dict(batch), 1)[0]  # the logits of all at once may be many
    before: list[tuple[torch.Size, Tensor]] = []

    def note(_: nn.Module, __: Any, output: Tensor) -> None:
        before.append((output.shape, _some(output, row)))

    handle = model.get_submodule(path).register_forward_hook(note)
    try:
        with torch.no_grad():
            logits = getattr(model(**model_inputs(model, row), return_dict=True), "logits", None)
    finally:
        handle.remove()
    if len(before) != 1 or logits is None or logits.shape != before[0][0]:
        return _NOTHING
    given, found = before[0][1], _some(logits, row)
    most = CONSTANT * float(found.norm())
    scale = float((found * given).sum() / given.square().sum())
    if float((found - scale * given).norm()) <= most:
        return (scale, None) if abs(scale - 1) > CONSTANT else _NOTHING
    shift = (found - given).mean(0)
    same = len(found) > 1 and float((found - given - shift).norm()) <= most
    return (1.0, shift) if same else _NOTHING


def _some(values: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """(rows, classes) float32, a copy: models work on their logits in place."""
    return real_rows(values, batch)[:LOOKED_AT].float().clone()


class _Reached(Exception):
    """The head has what it reads; the rest of the forward is not needed."""


class _InPlaceOfHead(nn.Module):
    """Stands where the head is: remembers its input and ends the forward."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.weight = head.weight
        self.seen: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        self.seen = hidden
        raise _Reached


def _head_input(model: PreTrainedModel, path: str, inputs: Mapping[str, Any]) -> Tensor:
    """What the head reads, without the product with it, which costs most of a small model's forward.

    Nor is there anything of what comes behind it, which may work on nothing but logits.
    """
    head = model.get_submodule(path)
    stand_in = _InPlaceOfHead(head)
    model.set_submodule(path, stand_in)
    try:
        with suppress(_Reached):
            model(**inputs)
    finally:
        model.set_submodule(path, head)
    if stand_in.seen is None:
        raise CalibrationError("the model's forward does not use its output head, so there is nothing to tune by")
    return stand_in.seen


def _head_path(model: PreTrainedModel) -> str | None:
    head = model.get_output_embeddings()
    return next((path for path, module in model.named_modules() if module is head), None) if head is not None else None


def _bias(head: nn.Module) -> Tensor | None:
    bias = getattr(head, "bias", None)
    return bias.detach() if isinstance(bias, Tensor) else None
