"""The zeros of an already sparse model, kept while it is fine-tuned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from hf_shrink.architectures.adapters import without_adapters
from hf_shrink.checkpoint.record import ShrinkRecord
from hf_shrink.errors import ShrinkError
from hf_shrink.pruning.zeros import ZeroKeeper, keep_zeros
from hf_shrink.training.models import is_sharded
from hf_shrink.training.schedule import Window


class KeepZeros:
    """A `Part` that changes nothing: what is zero when training begins is zero when it ends."""

    adds_parameters: ClassVar[bool] = False

    def __init__(self) -> None:
        self._keeper: ZeroKeeper | None = None

    def attach(self, model: PreTrainedModel) -> None:
        """Raises RecipeError where the model has no zeros to keep, ShrinkError where adapters would fill them."""
        check_no_adapters(model)
        keep_zeros(model).close()

    def attach_copy(self, model: PreTrainedModel) -> None:
        pass

    def begin(self, model: PreTrainedModel, window: Window) -> None:
        check_whole(model)
        if self._keeper is not None:
            self._keeper.close()
        self._keeper = keep_zeros(model)

    def settled(self, window: Window) -> int:
        return 0

    def before_optimizer_step(self, step: int, scale: float) -> None:
        pass

    def after_step(self, step: int) -> None:
        pass

    def finish(self, model: PreTrainedModel, record: ShrinkRecord) -> None:
        assert self._keeper is not None
        self._keeper.close()
        record.report.notes.append(
            f"{100 * self.figures()['sparsity']:.2f}% of the weights with zeros were kept at zero"
        )

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        pass

    def figures(self) -> dict[str, float]:
        assert self._keeper is not None
        return {"sparsity": zero_fraction(self._keeper)}


def zero_fraction(keeper: ZeroKeeper) -> float:
    """Of all weights that have zeros to keep."""
    kept = sum(int(mask.sum()) for mask in keeper.kept.values())
    return 1 - kept / max(sum(mask.numel() for mask in keeper.kept.values()), 1)


def check_no_adapters(model: PreTrainedModel) -> None:
    """Raises ShrinkError where adapters would fill zeros."""
    with without_adapters(model) as adapted:
        if adapted:
            raise ShrinkError(
                "adapters are added to the weights and fill their zeros; train the weights themselves, or prune heads "
                "and channels (what: width)"
            )


def check_whole(model: PreTrainedModel) -> None:
    """Raises ShrinkError under FSDP, whose optimizer sees flat pieces of the weights."""
    if is_sharded(model):
        raise ShrinkError("zeros of single weights cannot be kept under FSDP; train with DDP, or prune what: width")
