"""What every quantization method takes and gives. A method never sees a module or its name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from hf_shrink.ops.quantized import QuantizedWeight
from hf_shrink.plan import Scheme
from hf_shrink.registry import Registry
from hf_shrink.runtime.trainable import TrainableLinear

if TYPE_CHECKING:
    from hf_shrink.calibration.statistics import InputStatistics


class QuantizationMethod(Protocol):
    """A frozen dataclass whose fields are the options a recipe may set.

    One that also has a true `follows_dense` gets statistics with a `drift` where the dense model can be followed; one
    with a false `true_sequential` gets the statistics of a whole block before it solves any of its weights.
    """

    needs_statistics: ClassVar[bool]

    def solve(
        self,
        weight: Tensor,
        scheme: Scheme,
        statistics: InputStatistics | None,
        *,
        scale_dtype: torch.dtype,
        kept: Tensor | None = None,
    ) -> QuantizedWeight:
        """Choose a grid and integers for `weight`.

        Args:
            weight: (out_features, in_features) float32. Rows are solved independently unless the strategy is
                "tensor", so Linears that share their input can be stacked.
            scheme: a group size that does not divide in_features is resolved by `Scheme.for_width`.
            statistics: of the Linear's inputs; required where `needs_statistics`.
            scale_dtype: dtype of the stored scales.
            kept: bool (out_features, in_features); where it is false the weight is zero, and has to stay exactly zero.
                None: zeros are weights like others. Zero is on every grid, so rounding to nearest keeps it anyway.

        Raises:
            CalibrationError: NaN or Inf in the weight or the statistics, or statistics of no tokens.
        """
        ...


class BlockProblem(Protocol):
    """A block on its way to few bits, as methods that learn see it.

    Attributes:
        batches: how many calibration batches there are.
        weights: the block's weights, opened for training.
    """

    batches: int
    weights: Sequence[TrainableLinear]

    def loss(self, batch: int) -> Tensor:
        """Relative squared error of the block's output on one batch, against what the dense block puts out.

        The block's input is what the compressed blocks before it put out, the target comes from the dense model all
        along. A float32 scalar, with gradients to the weights where they are enabled.
        """
        ...


@dataclass(frozen=True)
class Learnt:
    """What came of learning a block: loss on held-out batches before and after, and the steps taken."""

    before: float
    after: float
    steps: int


@runtime_checkable
class LearningMethod(Protocol):
    """A quantization method that, once all weights of a block are solved, improves them together."""

    def learn(self, block: BlockProblem, seed: int) -> Learnt:
        """Change the block's weights in place, never for the worse on held-out batches."""
        ...


class ModelMethod(ABC):
    """A method that stores weights in a format of another library, through transformers' integration of it."""

    needs_statistics: ClassVar[bool] = False

    @abstractmethod
    def spares(self, model: nn.Module, weights: Mapping[str, tuple[int, int]], kind: str) -> dict[str, str]:
        """Which of these weights cannot be stored so, and why.

        Args:
            model: dense, before anything is changed.
            weights: (out_features, in_features) by module path, as they are when the method gets to them.
            kind: the format, a name in `plan.FORMATS`.

        Raises:
            RecipeError: the model cannot be stored so at all.
        """

    @abstractmethod
    def convert(self, model: Any, formats: Mapping[str, str]) -> None:
        """Replace the modules at the paths of `formats` in place and leave the model as `from_pretrained` would.

        Args:
            model: a transformers model, dense.
            formats: the format of every weight, by present module path; one format for all.

        Raises:
            RecipeError: the library does not run here, or stock cannot tell these modules from others.
            CalibrationError: a weight is out of the format's range.
        """


Method = QuantizationMethod | ModelMethod

__all__ = [
    "METHODS",
    "BlockProblem",
    "LearningMethod",
    "Learnt",
    "Method",
    "ModelMethod",
    "QuantizationMethod",
    "QuantizedWeight",
]

METHODS: Registry[Method] = Registry("quantization method", "hf_shrink.quantization")
