"""What a pruning method is: it sees weights and statistics of units, or numbered blocks, and never a module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

from torch import Tensor

from hf_shrink.calibration.labels import Labels
from hf_shrink.registry import Registry


@dataclass(frozen=True)
class UnitView:
    """What a scorer sees of one kind of units of one block.

    Attributes:
        rows: float32 (units, rows a unit, in) of every matrix that writes the units (query, key and value, or up and
            gate), biases aside. For query heads only the query's: keys and values stay when a head goes.
        columns: float32 (out, units, width) of the matrix that reads them (output or down).
        second_moment: float32 (units * width, units * width), the mean of x x^T over the inputs of that matrix, ordered
            as `columns`; None when the method needs no statistics.
        mask_gradients: float32 (samples, units), the gradient of each calibration sample's loss by a mask on the unit,
            at 1; None for methods that need none.
    """

    rows: tuple[Tensor, ...]
    columns: Tensor
    second_moment: Tensor | None = None
    mask_gradients: Tensor | None = None

    @property
    def units(self) -> int:
        return self.columns.shape[1]


@runtime_checkable
class GradientMethod(Protocol):
    """What a width method that reads `UnitView.mask_gradients` has besides.

    Attributes:
        tokens: about how many calibration tokens to take gradients on; None: all.
        labels: what the loss is of: the data's labels, those that the model draws itself, or either ("auto").
    """

    tokens: int | None
    labels: Labels


class WidthMethod(Protocol):
    """Scores units.

    Scores add up: what it costs to lose several units is the sum of their scores. So a norm is returned squared; a
    block's scores are only ever compared after division by their total.
    """

    needs_statistics: ClassVar[bool]

    def score(self, view: UnitView) -> Tensor:
        """Importance of every unit, float32 (units,), at least 0; higher is more important."""
        ...


class DepthProblem(Protocol):
    """A model seen as numbered blocks, which can be measured with some of them left out.

    Attributes:
        labels: what to call each block in reports.
    """

    labels: tuple[str, ...]

    def candidates(self, removed: Sequence[int]) -> tuple[int, ...]:
        """The blocks that may go next, ascending: at least one is left in every stack."""
        ...

    def influences(self, removed: Sequence[int], tokens: int | None = None) -> Mapping[int, float]:
        """Mean over tokens of 1 - cos(input, output) of every block left, without the `removed` ones."""
        ...

    def divergences(self, removed: Sequence[int], candidates: Sequence[int], tokens: int) -> Mapping[int, float]:
        """How far the model's predictions move from the dense ones without `removed` and one candidate more.

        KL(dense || pruned) in nats a prediction; 1 - cos of the last hidden states where the model predicts nothing.
        """
        ...


@dataclass(frozen=True)
class Removal:
    """One block taken out, and the damage that the method predicts of it."""

    block: int
    damage: float


class DepthMethod(Protocol):
    """Chooses blocks."""

    def removals(self, problem: DepthProblem) -> Iterator[Removal]:
        """Blocks in the order in which they go; the planner stops asking when it has enough."""
        ...


class VocabularyMethod(Protocol):
    """Chooses tokens."""

    @property
    def texts(self) -> tuple[str, ...]:
        """Names of data (see `calibration.documents`) to count tokens in; empty: the calibration data."""
        ...

    @property
    def tokens(self) -> int | None:
        """Most tokens to read of each of them; None: all."""
        ...

    @property
    def multiple_of(self) -> int:
        """The number of tokens kept is rounded up to a multiple of it, with tokens that would have gone."""
        ...

    def keeps(self, counts: Tensor) -> Tensor:
        """bool (tokens,): which stay, from int64 (tokens,), how often each is in the texts."""
        ...


WIDTH: Registry[WidthMethod] = Registry("width pruning method", "hf_shrink.pruning.width")
DEPTH: Registry[DepthMethod] = Registry("depth pruning method", "hf_shrink.pruning.depth")
VOCABULARY: Registry[VocabularyMethod] = Registry("vocabulary pruning method", "hf_shrink.pruning.vocabulary")
