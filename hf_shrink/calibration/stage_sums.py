"""Second moments of the inputs of a block's matrices, stage by stage, while its batches are on their way through it."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from hf_shrink.calibration.experts import ExpertTokens
from hf_shrink.calibration.merging import merged
from hf_shrink.calibration.statistics import InputStatistics
from hf_shrink.sharding import Share

if TYPE_CHECKING:
    from hf_shrink.calibration.dense_stream import Follower


class StageSums:
    """Adds up what the batches of this process bring, and brings it together with what the others' do.

    Args:
        experts: what the block's experts see.
        real_tokens: by batch, from a matrix's input to its rows that are not padding.
        share: which batches are this process's.
        longest: by path, as of `InputStatistics`; None for paths that are not in it.
        follower: the dense stream inside the block, where it is followed, so that statistics have a `drift`.
    """

    def __init__(
        self,
        experts: ExpertTokens,
        real_tokens: Callable[[int], Callable[[Tensor], Tensor]],
        share: Share,
        longest: Mapping[str, float],
        follower: Follower | None,
    ) -> None:
        self._experts, self._real_tokens, self._share = experts, real_tokens, share
        self._longest, self._follower = longest, follower
        self._own: dict[str, InputStatistics] = {}

    def add(self, batch: int, stage: int, paths: Sequence[str], x: Tensor) -> None:
        """A batch has come to a stage, the matrices at `paths`; x is what the first of them gets."""
        follower = self._follower
        for sharing, given in self._experts.inputs(batch, paths, x):
            if sharing[0] not in self._own:
                empty = InputStatistics.empty(given.shape[-1], given.device, self._longest.get(sharing[0]))
                self._own.update(dict.fromkeys(sharing, empty))
            real = self._real_tokens(batch)(given)
            dense_input = follower.real_input(batch, stage) if follower is not None else None
            if follower is None or dense_input is None:
                self._own[sharing[0]].add(real)
            else:
                self._own[sharing[0]].add_drift(real, dense_input, held_out=follower.is_held_out(batch))

    def finish(self, paths: Sequence[str], starved: Container[str]) -> dict[str, InputStatistics | None]:
        """The statistics of a stage's matrices, by path; None for those of experts in `starved`.

        Raises:
            CalibrationError: a matrix saw no tokens, or numbers that are not finite.
        """
        found: dict[str, InputStatistics | None] = {}
        finished: set[int] = set()
        for path, statistics in merged({path: self._own.pop(path, None) for path in paths}, self._share).items():
            statistics = statistics or InputStatistics.empty(1)
            if path.rpartition(".")[0] in starved:
                found[path] = None
                continue
            found[path] = statistics if id(statistics) in finished else statistics.finish(path)
            finished.add(id(statistics))
        return found
