"""Predictions of a model on a few rows only, so that a large output head costs little."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_shrink.calibration.padding import token_mask
from hf_shrink.calibration.precision import fast_products
from hf_shrink.calibration.predictions import Predictions, keep, predictions_of
from hf_shrink.calibration.targets import kind_of


@dataclass(frozen=True)
class Reference:
    """What the dense model predicts for one batch.

    Attributes:
        kept: from `keep`, of the rows that count.
        rows: their positions among the batch's tokens, when the head can run on these alone; else None.
    """

    kept: Predictions
    rows: Tensor | None


class Predictor:
    """Runs a model. What is compared is chosen by the dense model's first run on each batch."""

    def __init__(self, model: nn.Module, fast: bool) -> None:
        self._model = model
        self._fast = fast
        self._kind = kind_of(model)
        self._selects: bool | None = None  # whether the head may be given some rows only; None: not tried yet

    def run(self, inputs: Mapping[str, Any]) -> Any:
        """The model's whole output."""
        with torch.no_grad(), fast_products(self._model) if self._fast else nullcontext():
            return self._model(**inputs)

    def reference(self, inputs: Mapping[str, Any], most: int, largest: int) -> Reference:
        """The predictions of the model as it is now, of at most `most` rows and `largest` bytes in float32."""
        seen: list[Tensor] = []
        with _watching(self._head(), seen):
            found = self.run(inputs)
        predictions = self._of(found, inputs)
        most = max(1, min(most, largest // (4 * predictions.values.shape[1])))
        rows = _rows(found, seen, inputs, most, self._model)
        if rows is None or self._selects is False:
            return Reference(keep(predictions.thinned(most)), None)
        expected = found["logits"].flatten(0, 1)[rows]
        if self._selects is None:
            with self._head_on(rows):
                selected = self._of(self.run(inputs), inputs).values
            scale = float(expected.float().abs().max().nan_to_num()) if len(expected) else 0.0
            self._selects = selected.shape == expected.shape and torch.allclose(
                selected.float(), expected.float(), rtol=1e-2, atol=1e-2 * scale, equal_nan=True
            )
        return Reference(keep(Predictions(expected, True)), rows if self._selects else None)

    def predict(self, inputs: Mapping[str, Any], like: Reference) -> Predictions:
        """The predictions of the model as it is now, of the same rows."""
        if like.rows is None:
            return self._of(self.run(inputs), inputs).thinned(len(like.kept.values))
        with self._head_on(like.rows):
            return self._of(self.run(inputs), inputs)

    def _of(self, found: Any, inputs: Mapping[str, Any]) -> Predictions:
        return predictions_of(found, inputs, self._kind, self._model)

    def _head(self) -> nn.Module | None:
        find = getattr(self._model, "get_output_embeddings", None)
        head = find() if callable(find) else None
        return head if isinstance(head, nn.Module) else None

    @contextmanager
    def _head_on(self, rows: Tensor) -> Iterator[None]:
        head = self._head()
        assert head is not None

        def select(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden: Tensor = args[0]
            return (hidden.flatten(0, -2)[rows.to(hidden.device)][None], *args[1:])

        handle = head.register_forward_pre_hook(select)
        try:
            yield
        finally:
            handle.remove()


@contextmanager
def _watching(head: nn.Module | None, seen: list[Tensor]) -> Iterator[None]:
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(lambda _, args: seen.extend(args[:1]))
    try:
        yield
    finally:
        handle.remove()


def _rows(
    found: Mapping[str, Any], seen: list[Tensor], inputs: Mapping[str, Any], most: int, model: nn.Module
) -> Tensor | None:
    """Positions of at most `most` real tokens, evenly spread; None where logits are not the head's, token by token."""
    logits = found.get("logits")
    if logits is None or logits.dim() != 3 or len(seen) != 1 or seen[0].shape[:-1] != logits.shape[:-1]:
        return None
    mask = token_mask(inputs, logits.shape[:2], model)
    real = torch.arange(logits.shape[:2].numel()) if mask is None else mask.flatten().cpu().nonzero()[:, 0]
    return real if len(real) <= most else real[torch.linspace(0, len(real) - 1, most).long()]
