"""A model while it is trained, and the two ways out: what was trained is kept, or everything is as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_shrink.errors import ArchitectureError
from hf_shrink.runtime.packed import PackedModule


class Change(Protocol):
    """One model, made ready to be trained.

    Attributes:
        trained: what goes to the trainer.
    """

    trained: nn.Module

    def untrained(self) -> AbstractContextManager[nn.Module]:
        """The model as it was stored, to evaluate before it is trained."""

    def finish(self) -> Any:
        """The model as it will be stored: what to evaluate, and to go on with."""

    def undo(self) -> None:
        """Put the model back, bit for bit, before or after `finish`."""


class Full:
    """Every floating-point parameter is trained, in float32."""

    def __init__(self, model: PreTrainedModel) -> None:
        if any(isinstance(m, PackedModule) for m in model.modules()) or getattr(model, "is_quantized", False):
            raise ArchitectureError(
                "the weights are quantized, so they cannot be trained as they are; use method 'scales', or 'lora' for "
                "an adapter beside them"
            )
        self.trained: nn.Module = model
        self._before: list[tuple[nn.Parameter, Tensor, bool]] = []
        for parameter in model.parameters():
            self._before.append((parameter, parameter.data, parameter.requires_grad))
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(torch.float32, copy=True)
            parameter.requires_grad_(parameter.is_floating_point())

    @contextmanager
    def untrained(self) -> Iterator[nn.Module]:
        copies = [parameter.data for parameter, _, _ in self._before]
        for (parameter, before, _), copy in zip(self._before, copies, strict=True):
            parameter.data = before.to(copy.device)
        try:
            yield self.trained
        finally:
            for (parameter, _, _), copy in zip(self._before, copies, strict=True):
                parameter.data = copy

    def finish(self) -> PreTrainedModel:
        for parameter, before, wanted in self._before:
            parameter.data = parameter.data.to(before.dtype)
            parameter.requires_grad_(wanted)
        assert isinstance(self.trained, PreTrainedModel)
        return self.trained

    def undo(self) -> None:
        for parameter, before, wanted in self._before:
            parameter.data = before
            parameter.requires_grad_(wanted)
