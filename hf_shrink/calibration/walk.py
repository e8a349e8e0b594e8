"""The walk: calibration batches pass through a stack one block at a time; each is dealt with before the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from hf_shrink.calibration.arguments import Arguments
from hf_shrink.calibration.capture import Captured, capture, first_output, run_with_outputs
from hf_shrink.calibration.collect import Collector, LastInputSeen
from hf_shrink.calibration.experts import ExpertTokens, refuse_starved
from hf_shrink.calibration.padding import without_padding
from hf_shrink.calibration.passed import Passed
from hf_shrink.calibration.shelf import Shelf
from hf_shrink.calibration.stage_sums import StageSums
from hf_shrink.calibration.stages import StagedRun, find_stages
from hf_shrink.calibration.statistics import InputStatistics
from hf_shrink.errors import CalibrationError
from hf_shrink.ops.precision import fast_precision
from hf_shrink.residence import Room, residence_of
from hf_shrink.residence.trim import release_free_memory
from hf_shrink.runtime.experts import Watch, watching
from hf_shrink.sharding import Share, share

if TYPE_CHECKING:
    from hf_shrink.calibration.dense_stream import DenseStream

MOST_WAITING = 16 << 30  # bytes of batches that wait inside a block, most of them in a file


class StackWalk:
    """Holds the hidden states in front of the current block, for all batches of this process.

    Use: for each block in order, `statistics(...)` on it, change it, then `advance(...)`. Where several processes share
    the batches, statistics are of all of them, and the same in every process; what is by batch is of the own ones.

    Attributes:
        share: which of the batches are this process's.
        hidden: inputs of the current block, one (batch, sequence, width) tensor a batch.
        arguments: what blocks are called with besides, and hand to later ones.
        position: index of the current block.
        reference: the current block's output for the first batch when statistics were first taken; None before that.
        starved: experts of all blocks so far that saw too few tokens, by path, and how many they saw.

    Args:
        model: the whole model; blocks before this stack may already be compressed.
        blocks: the stack's blocks, in order.
        batches: model inputs; their sizes decide the order of summation, so they decide the bytes of the result.
        compute_dtype: dtype of the hidden states; blocks must be in it when they run (see `computing`).
        padded: whether `attention_mask` is about this stack's tokens (False in a tower: it is about the text's).
        starved_experts: "error", or "rtn": their matrices get no statistics.
        fast: blocks may multiply in bfloat16 where that is native. Hidden states and statistics stay in float32.
        room: as of `capture`.
        shared: which of the batches are this process's, which may be none of them; None: as `sharding.share` says.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        batches: Sequence[Mapping[str, Any]],
        compute_dtype: torch.dtype = torch.float32,
        padded: bool = True,
        starved_experts: Literal["error", "rtn"] = "error",
        fast: bool = False,
        room: Room | None = None,
        shared: Share | None = None,
    ) -> None:
        self.share = share(len(batches)) if shared is None else shared
        batches = self.share.of(batches)
        spare = self.share.split and not batches
        found = Captured() if spare else capture(model, blocks, batches, compute_dtype, room)
        self._blocks = list(blocks)
        self._batches = batches
        self._dtype = compute_dtype
        self.arguments = Arguments(found.calls, found.links, compute_dtype)
        self._masks = found.masks if padded else [None] * len(found.masks)
        self._contexts = found.contexts
        # What each batch's current call hands to the block besides the hidden states.
        self._given: list[list[Tensor]] = [[] for _ in batches]
        self.hidden = found.hidden
        residence = residence_of(model)
        self._shelf: dict[str, Any] = {} if residence is None else {"room": residence.room, "folder": residence.folder}
        self._fast = fast
        self.position = 0
        self.reference: Tensor | None = None
        self.starved: dict[str, int] = {}
        self._refuses_starved = starved_experts == "error"
        self._experts = ExpertTokens(model)

    @property
    def block(self) -> nn.Module:
        """The current one."""
        return self._blocks[self.position]

    @property
    def tokens(self) -> int:
        """Tokens of all processes that pass through the stack, padding not counted."""
        own = sum(
            int(mask.sum()) if mask is not None else self.hidden.kind(batch).shape[:-1].numel()
            for batch, mask in enumerate(self._masks)
        )
        return int(self.share.totals([own])[0])

    def call(self, batch: int) -> Any:
        """Run the current block on one batch, without gradients; returns its whole output."""
        with torch.no_grad():
            return self.run(batch)

    def run(self, batch: int) -> Any:
        """As `call`, with gradients where they are enabled."""
        return self.run_block(batch, self.position, self.hidden[batch])

    def run_block(self, batch: int, block: int, hidden: Tensor) -> Any:
        """Any block, by its place, on hidden states that are not kept."""
        args, kwargs = self.arguments.of(batch, block)
        self._given[batch] = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        precise = nullcontext() if not self._fast else fast_precision(hidden.device, cached=False)
        with watching(self._masks[batch]) as watch, precise:
            self._experts.watches[batch] = watch
            return self._blocks[block](hidden, *args, **kwargs)

    def mask(self, batch: int) -> Tensor | None:
        """bool (batch, sequence) of the real tokens; None when nothing is padded."""
        return self._masks[batch]

    def routing(self, batch: int) -> Watch:
        """What the current block's experts got of a batch, once `call` has run on it."""
        return self._experts.watches[batch]

    def outputs(self, batches: int | None = None) -> list[Tensor]:
        """The current block's hidden states for the first `batches` batches (all by default), not kept."""
        return [first_output(self.call(b)) for b in range(len(self.hidden) if batches is None else batches)]

    def statistics(
        self, matrices: Mapping[str, nn.Module], longest: float | None = None, *, passing: bool = False
    ) -> dict[str, InputStatistics]:
        """Second moments of the inputs of the current block's matrices, by path.

        Matrices that get the very same tensor (query, key and value; gate and up) share one object. Once the order of
        the calls is known, a batch ends when the last matrix has its input. Matrices of experts that saw too few tokens
        are absent where `starved_experts` is "rtn". `longest`: as of `InputStatistics`. `passing`: the block stays as
        it is, and the walk advances in the same pass.

        Raises:
            CalibrationError: a matrix saw no tokens, or not finite ones; an expert saw too few.
        """
        collector = Collector(matrices, longest, whole=passing)
        for batch in range(len(self.hidden)):
            with collector.listening(self.real_tokens(batch)), suppress(LastInputSeen):
                output = self.call(batch)
                if passing:
                    self.take(batch, output)
                # Unless passing, only the first batch gets here, to learn which matrix comes last.
                self.reference = first_output(output) if self.reference is None else self.reference
        starved = self._find_starved(matrices)
        if passing:
            self.step()
        return collector.finish(self.share, without=lambda path: path.rpartition(".")[0] in starved)

    def _find_starved(self, matrices: Mapping[str, nn.Module]) -> dict[str, int]:
        """Experts that saw too few tokens. Raises CalibrationError unless these may go without statistics."""
        found = self._experts.starved(matrices, self.share)
        if self._refuses_starved:
            refuse_starved(found, matrices)
        self.starved.update(found)
        return found

    def advance(self) -> None:
        """Send all batches through the current block, as it is now, and step to the next."""
        for batch in range(len(self.hidden)):
            self.take(batch, self.call(batch))
        self.step()

    def advance_in_stages(
        self,
        matrices: Mapping[str, nn.Module],
        solve: Callable[[dict[str, InputStatistics | None]], None],
        current: Callable[[str], nn.Module],
        *,
        further: bool = True,
        dense: DenseStream | None = None,
        longest: Mapping[str, float] | None = None,
        in_place: bool = True,
    ) -> Passed | None:
        """Statistics, replacement and advance in one pass: see `stages.py`.

        Args:
            matrices: of the current block, by path.
            solve: called for each stage with its matrices' statistics, by path; may replace them in the model. None
                stands for experts that saw too few tokens.
            current: the module that is at a path now.
            further: False when nothing comes after this block, so that its outputs are not needed; the walk then stays.
            dense: in front of this block too: it goes along, so that statistics have a `drift`, and to the next block.
            longest: by path of a matrix, as of `InputStatistics`; None for matrices that are not in it.
            in_place: `solve` may change weights, of which the dense stream then needs copies, not only replace modules.

        Returns:
            The block's outputs for the first batch. None, with nothing done, when the block cannot be stopped
            in between (a matrix runs twice or not at all) or its waiting batches would be larger than MOST_WAITING.

        Raises:
            CalibrationError: as `statistics`; an expert that saw too few is found before any of the block is solved.
        """
        found = find_stages(matrices, self.call, self._experts.phase)
        # A waiting batch holds about three more tensors like its hidden states. Decided by sizes alone, never by what
        # memory there is, since the two ways to walk do not give the same bytes.
        waiting = 0 if found is None else self.share.count * (found.largest + 3 * self.hidden.kind(0).nbytes)
        if any(self.share.ranks.gather(found is None or waiting > MOST_WAITING)):
            return None
        assert found is not None
        stages = found.stages
        before = first_output(found.output) if self.reference is None else self.reference
        block = self.block
        if dense is not None and any(self._experts.phase(path) for path in matrices):
            dense.advance()  # tokens of an expert here and there are not the same ones
            dense = None
        with ExitStack() as stack:
            # Before the block's modules are made to wait, which a copy of them must not.
            following = None if dense is None else dense.following(block, matrices, stages, copies=in_place)
            follower = None if following is None else stack.enter_context(following)
            own = stack.enter_context(self.staged(matrices, stages, current, block))
            sums = StageSums(self._experts, self.real_tokens, self.share, longest or {}, follower)
            for stage, paths in enumerate(stages):
                for batch in range(len(self.hidden)):
                    x = own.reach(batch, stage)
                    if x is not None:
                        sums.add(batch, stage, paths, x)
                    own.rest(batch)
                    if follower is not None:
                        follower.rest(batch)
                release_free_memory()
                solve(sums.finish(paths, self._find_starved(matrices) if self._experts.phase(paths[0]) else ()))
            first = first_output(own.finish(0) if not further else self.take(0, own.finish(0)))
            for batch in range(1, len(self.hidden)) if further else ():
                self.take(batch, own.finish(batch))
        if further:
            self.step()
        return Passed(before, first)

    def staged(
        self,
        matrices: Mapping[str, nn.Module],
        stages: Sequence[Sequence[str]],
        current: Callable[[str], nn.Module],
        block: nn.Module,
    ) -> StagedRun:
        """All batches on their way through the current block; what waits keeps to the walk's limit of memory."""
        return StagedRun(matrices, stages, len(self.hidden), self.call, current, block, Shelf(**self._shelf))

    def take(self, batch: int, output: Any) -> Any:
        """Make a block's output the batch's hidden states; returns it."""
        hidden = first_output(output)
        if not torch.isfinite(hidden).all():
            raise CalibrationError(
                f"NaN or Inf in the output of block {self.position}; check the weights and the calibration data"
            )
        self.hidden[batch] = hidden.to(self._dtype)
        self.arguments.done(batch, self.position, output)
        return output

    def stand_in(self, block: nn.Module) -> None:
        """Run another module in the place of the current block."""
        self._blocks[self.position] = block

    def step(self) -> None:
        """Go on to the next block, once `take` was called for every batch."""
        self.position += 1
        self.reference = None

    def go_to(self, position: int, starved: Mapping[str, int]) -> None:
        """Be in front of another block, whose inputs `hidden` already is."""
        self.arguments.forget(range(self.position, position))
        self.position, self.reference = position, None
        self.starved.update(starved)

    def statistics_after(self, model: nn.Module, matrices: Mapping[str, nn.Module]) -> dict[str, InputStatistics]:
        """Second moments of the inputs of matrices that come after the stack, once every block was advanced."""
        if self.position != len(self._blocks):
            raise ValueError("statistics_after comes after the last advance")
        collector = Collector(matrices)
        self._given = [[] for _ in self._batches]
        for batch, inputs in enumerate(self._batches):
            with collector.listening(self.real_tokens(batch)), suppress(LastInputSeen):
                run_with_outputs(model, self._blocks, inputs, self.hidden[batch])
        return collector.finish(self.share)

    def real_tokens(self, batch: int) -> Callable[[Tensor], Tensor]:
        """From a matrix's input to its rows that are not padding, of the encoder where cross attention reads that."""

        def real(x: Tensor) -> Tensor:
            if self._contexts and any(x is given for given in self._given[batch]):
                return without_padding(x, self._contexts[batch])
            return without_padding(x, self._masks[batch])

        return real
