"""What a pruning method is: it sees weights and statistics of units, or numbered blocks, and never a module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from hf_shrink.calibration.labels import Labels
from hf_shrink.ops.removal import RemovalCurve
from hf_shrink.registry import Registry
from hf_shrink.sparsity import Amount

if TYPE_CHECKING:
    from hf_shrink.calibration.statistics import InputStatistics


@dataclass(frozen=True)
class UnitView:
    """What a scorer sees of one kind of units of one block.

    Attributes:
        rows: float32 (units, rows a unit, in) of every matrix that writes the units (query, key and value, or up and
            gate), biases aside. For query heads only the query's: keys and values stay when a head goes.
        columns: float32 (out, units, width) of the matrix that reads them (output or down).
        second_moment: float32 (units * width, units * width), the mean of x x^T over the inputs of that matrix, ordered
            as `columns`; None when the method needs no statistics. Where a refit puts their mean into a bias, of
            the inputs without their mean.
        mask_gradients: float32 (samples, units), the gradient of each calibration sample's loss by a mask on the unit,
            at 1; None for methods that need none.
        groups: query heads: the number of KV groups, which all lose a head before any loses its next; else None.
    """

    rows: tuple[Tensor, ...]
    columns: Tensor
    second_moment: Tensor | None = None
    mask_gradients: Tensor | None = None
    groups: int | None = None

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


class ScoringMethod(Protocol):
    """Scores units one by one.

    Scores add up: what it costs to lose several units is the sum of their scores. So a norm is returned squared; a
    block's scores are only ever compared after division by their total.
    """

    needs_statistics: ClassVar[bool]

    def score(self, view: UnitView) -> Tensor:
        """Importance of every unit, float32 (units,), at least 0; higher is more important."""
        ...


@runtime_checkable
class OrderingMethod(Protocol):
    """Says in which order units go, where what one costs depends on which others are gone."""

    needs_statistics: ClassVar[bool]

    def curve(self, view: UnitView) -> RemovalCurve:
        """All units in the order in which they go. Losses are in the same measure for every view of one matrix."""
        ...

    def improved(self, view: UnitView, removed: Tensor) -> Tensor:
        """A set of units to remove that is no worse than `removed`, int64 ascending, and as large (in every group)."""
        ...


WidthMethod = ScoringMethod | OrderingMethod


@dataclass(frozen=True)
class Look:
    """How closely a measurement looks.

    Attributes:
        tokens: calibration tokens that run through the model, rounded up to whole samples.
        predictions: how many of their predictions are compared, evenly spread; the output head runs on these only.
        fast: multiply in bfloat16 where that is native.
    """

    tokens: int
    predictions: int
    fast: bool = False


class DepthProblem(Protocol):
    """A model seen as numbered items (blocks, or parts of blocks), which can be measured with some of them left out.

    Attributes:
        labels: what to call each item in reports.
        sizes: what each takes towards the goal.
        stacks: the number of the stack that each lies in; neighbours with the same number are neighbours there.
    """

    labels: tuple[str, ...]
    sizes: tuple[int, ...]
    stacks: tuple[int, ...]

    def candidates(self, removed: Sequence[int]) -> tuple[int, ...]:
        """The items that may go next, ascending: none once the goal is reached."""
        ...

    def allowed(self, removed: Sequence[int]) -> bool:
        """Whether the model works without these, whatever the goal is."""
        ...

    def influences(self, removed: Sequence[int], tokens: int | None = None) -> Mapping[int, float]:
        """Mean over tokens of 1 - cos(input, output) of every block left, without the `removed` ones."""
        ...

    def angles(self, spans: Sequence[Sequence[int]], tokens: int) -> list[float]:
        """Mean over tokens of the angle between the input of a span's first block and the output of its last, over pi.

        Spans are neighbouring blocks of one stack, ascending.
        """
        ...

    def divergences(self, base: Sequence[int], trials: Sequence[Sequence[int]], look: Look) -> list[float]:
        """How far the model's predictions move from the dense ones without the items of each trial.

        KL(dense || pruned) in nats a prediction; 1 - cos of the last hidden states where the model predicts nothing.
        A trial costs what runs behind the first block in which it differs from `base`.
        """
        ...


@dataclass(frozen=True)
class Removal:
    """One item taken out, and the damage that the method predicts of it."""

    item: int
    damage: float


class DepthMethod(Protocol):
    """Chooses items.

    Attributes:
        takes_parts: whether it can choose among parts of blocks.
    """

    takes_parts: ClassVar[bool]

    def removals(self, problem: DepthProblem) -> Iterator[Removal]:
        """What goes, until the problem has no more candidates."""
        ...


@dataclass(frozen=True)
class ExpertView:
    """What a scorer sees of the experts of one block, measured on calibration data, padding left out.

    Attributes:
        tokens: int64 (experts,), the tokens that the router sent to each.
        mass: float64 (experts,), the sum of the router's weights over these tokens.
        energy: float64 (experts,), the sum of the router's weight times the L2 norm of the expert's output.
        likeness: float64 (experts, experts), the cosine between two experts' router logits over all tokens.
    """

    tokens: Tensor
    mass: Tensor
    energy: Tensor
    likeness: Tensor


class ExpertMethod(Protocol):
    """Scores experts. `merge`: whether removed ones are merged into what is kept."""

    @property
    def merge(self) -> bool: ...

    def score(self, view: ExpertView) -> Tensor:
        """Importance of every expert, float64 (experts,); higher is more important."""
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


class HiddenMethod(Protocol):
    """Chooses the directions of a residual stream that are kept."""

    def directions(self, moment: Tensor) -> Tensor:
        """An orthogonal matrix, float64 (width, width), its columns the directions, the most important first.

        Args:
            moment: float64 (width, width), the mean of x x^T over what the norms pass on of the stream, before their
                weights, over all tokens and all norms.
        """
        ...


@dataclass(frozen=True)
class WeightView:
    """What a method that zeroes single weights sees of one of them.

    Attributes:
        rows: float32 (out, in), the weight as a matrix; a copy, which the method may change.
        parameter: the parameter itself, in its own shape and dtype.
        as_rows: from a tensor of the parameter's shape to (out, in).
        amount: how many weights become zero.
    """

    rows: Tensor
    parameter: Tensor
    as_rows: Callable[[Tensor], Tensor]
    amount: Amount


@dataclass(frozen=True)
class Masked:
    """A weight with zeros: float32 (out, in), and which of its weights are kept, bool (out, in)."""

    rows: Tensor
    kept: Tensor
    notes: tuple[str, ...] = ()


class WeightsMethod(Protocol):
    """Zeroes single weights (unstructured, or N of every M kept). A frozen dataclass; its fields are options.

    One that also has `granularity` "global" has a `saliency(view, None)`; the planner then ranks all weights at once
    and gives each its own sparsity. One with a true `changes_weights` also changes what it keeps.
    """

    needs_statistics: ClassVar[bool]

    def prune(self, views: Sequence[WeightView], statistics: InputStatistics | None) -> list[Masked]:
        """Choose what becomes zero, and change what is kept where the method does so.

        Args:
            views: weights that read the same input; each is decided by itself.
            statistics: of that input; required where `needs_statistics`.

        Raises:
            CalibrationError: statistics are missing, or numbers are not finite.
        """
        ...


WIDTH: Registry[WidthMethod] = Registry("width pruning method", "hf_shrink.pruning.width")
DEPTH: Registry[DepthMethod] = Registry("depth pruning method", "hf_shrink.pruning.depth")
VOCABULARY: Registry[VocabularyMethod] = Registry("vocabulary pruning method", "hf_shrink.pruning.vocabulary")
EXPERTS: Registry[ExpertMethod] = Registry("expert pruning method", "hf_shrink.pruning.experts")
HIDDEN: Registry[HiddenMethod] = Registry("residual width method", "hf_shrink.pruning.hidden")
WEIGHTS: Registry[WeightsMethod] = Registry("weights pruning method", "hf_shrink.pruning.weights")
