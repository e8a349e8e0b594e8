"""The seam of the room: what one step of a recipe is while a model is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Protocol, runtime_checkable

from torch import Tensor
from transformers import PreTrainedModel

from hf_shrink.architectures.bound import Cuts
from hf_shrink.checkpoint.record import ShrinkRecord
from hf_shrink.training.schedule import Window


class Part(Protocol):
    """One step of a recipe, driven by `ShrinkCallback`; made anew for every model.

    `model` is the bare transformers model: without DDP, FSDP, `torch.compile` and PEFT around it. Its layers may hold
    adapters, and under FSDP a piece of their weights only (`hf_shrink.training.models`).

    Attributes:
        adds_parameters: whether `attach` gives the model parameters, which the optimizer must get to know.
    """

    adds_parameters: ClassVar[bool]

    def attach(self, model: PreTrainedModel) -> None:
        """At the end of `Trainer.__init__`: before the model is wrapped, before there is an optimizer. Checks
        everything that can be checked, and puts hooks and parameters into place.

        Raises:
            ShrinkError: the model does not allow the step.
        """
        ...

    def attach_copy(self, model: PreTrainedModel) -> None:
        """A new model, like the one that was attached to, is about to get the trained weights (FSDP; `finish`
        follows): give it the parameters that are in the state dict."""
        ...

    def begin(self, model: PreTrainedModel, window: Window) -> None:
        """Training begins, from its first step or (then `load` follows) from a checkpoint. The model is on its device,
        and has the weights of the checkpoint. May be called again, when the Trainer starts over with smaller batches.
        """
        ...

    def settled(self, window: Window) -> int:
        """The step from which on the model computes as the finished one will, its weights aside."""
        ...

    def before_optimizer_step(self, step: int, scale: float) -> None:
        """Gradients are there, accumulated and clipped.

        Args:
            step: the number of this optimizer step, from 1.
            scale: what losses were multiplied by for the backward pass (float16); parameters' gradients are not
                scaled any more, whatever else took gradients still is.
        """
        ...

    def after_step(self, step: int) -> None:
        """The optimizer has made this step; 0: training is about to begin, and from no checkpoint."""
        ...

    def finish(self, model: PreTrainedModel, record: ShrinkRecord) -> None:
        """Make it real, in place: cut, or pack. Add to `record` what was done: its plan, notes of its report.

        Args:
            model: the one that was attached to, adapters merged; under FSDP a whole copy of it on the CPU with the
                trained weights, made anew for every save, on rank 0 only.
        """
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold to go on from, besides the model's own weights."""
        ...

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` gave; follows `begin`, or the last step, where an earlier one was the best."""
        ...

    def figures(self) -> dict[str, float]:
        """What the Trainer logs, by name, such as "sparsity"."""
        ...


@runtime_checkable
class Cutting(Protocol):
    """A `Part` that cuts rows and columns of matrices when it is finished."""

    def cuts(self) -> Cuts:
        """What would be kept of every matrix that loses something, if it were finished now."""
        ...
