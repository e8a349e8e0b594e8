"""The walk: calibration batches pass through a stack one block at a time; each is dealt with before the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_shrink.calibration.capture import Call, capture, first_output, run_with_outputs
from hf_shrink.calibration.stages import find_stages, run_in_stages
from hf_shrink.calibration.statistics import InputStatistics
from hf_shrink.errors import CalibrationError


class _LastInputSeen(Exception):
    """The last matrix of the block has its input; the rest of the block's forward is not needed."""


MOST_WAITING = 16 << 30  # bytes of batches that wait inside a block, most of them in a file


class Passed(NamedTuple):
    """A block's output for the first batch, before and after it was compressed."""

    before: Tensor
    after: Tensor


class StackWalk:
    """Holds the hidden states in front of the current block, for all batches.

    Use: for each block in order, `statistics(...)` on it, change it, then `advance(...)`.

    Attributes:
        hidden: inputs of the current block, one (batch, sequence, width) tensor a batch.
        position: index of the current block.
        reference: the current block's output for the first batch when statistics were first taken; None before that.

    Args:
        model: the whole model; blocks before this stack may already be compressed.
        blocks: the stack's blocks, in order.
        batches: model inputs; their sizes decide the order of summation, so they decide the bytes of the result.
        compute_dtype: dtype of the hidden states; blocks must be in it when they run (see `computing`).
        padded: whether `attention_mask` is about this stack's tokens (False in a tower: it is about the text's).
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        batches: Sequence[Mapping[str, Any]],
        compute_dtype: torch.dtype = torch.float32,
        padded: bool = True,
    ) -> None:
        found = capture(model, blocks, batches)
        self._blocks = list(blocks)
        self._batches = batches
        self._dtype = compute_dtype
        self._calls = found.calls
        self._links = found.links
        self._masks = found.masks if padded else [None] * len(found.masks)
        self._contexts = found.contexts
        # What each batch's current call hands to the block besides the hidden states.
        self._given: list[list[Tensor]] = [[] for _ in batches]
        self.hidden = [h.to(compute_dtype) for h in found.hidden]
        self.position = 0
        self.reference: Tensor | None = None
        self._handed: list[dict[tuple[int, int], Any]] = [{} for _ in batches]

    @property
    def tokens(self) -> int:
        """Tokens that pass through the stack, padding not counted."""
        return sum(
            int(mask.sum()) if mask is not None else hidden.shape[:-1].numel()
            for hidden, mask in zip(self.hidden, self._masks, strict=True)
        )

    def call(self, batch: int) -> Any:
        """Run the current block on one batch, without gradients; returns its whole output."""
        with torch.no_grad():
            return self.run(batch)

    def run(self, batch: int) -> Any:
        """As `call`, with gradients where they are enabled."""
        args, kwargs = self._arguments(batch)
        self._given[batch] = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        return self._blocks[self.position](self.hidden[batch], *args, **kwargs)

    def mask(self, batch: int) -> Tensor | None:
        """bool (batch, sequence) of the real tokens; None when nothing is padded."""
        return self._masks[batch]

    def outputs(self, batches: int | None = None) -> list[Tensor]:
        """The current block's hidden states for the first `batches` batches (all by default), not kept."""
        return [first_output(self.call(b)) for b in range(len(self.hidden) if batches is None else batches)]

    def statistics(self, matrices: Mapping[str, nn.Module]) -> dict[str, InputStatistics]:
        """Second moments of the inputs of the current block's matrices, by path.

        Matrices that get the very same tensor (query, key and value; gate and up) share one object. Once the order of
        the calls is known, a batch ends when the last matrix has its input.

        Raises:
            CalibrationError: a matrix saw no tokens, or not finite ones.
        """
        collector = _Collector(matrices)
        for batch in range(len(self.hidden)):
            with collector.listening(self._real_tokens(batch)), suppress(_LastInputSeen):
                output = first_output(self.call(batch))
                # Only the first batch gets here: it runs to the end, to learn which matrix comes last.
                self.reference = output if self.reference is None else self.reference
        return collector.finish()

    def advance(self) -> None:
        """Send all batches through the current block, as it is now, and step to the next."""
        for batch in range(len(self.hidden)):
            self._take(batch, self.call(batch))
        self._step()

    def advance_in_stages(
        self,
        matrices: Mapping[str, nn.Module],
        solve: Callable[[dict[str, InputStatistics]], None],
        current: Callable[[str], nn.Module],
        *,
        further: bool = True,
    ) -> Passed | None:
        """Statistics, replacement and advance in one pass: see `stages.py`.

        Args:
            matrices: of the current block, by path.
            solve: called for each stage with its matrices' statistics, by path; may replace them in the model.
            current: the module that is at a path now.
            further: False when nothing comes after this block, so that its outputs are not needed; the walk then stays.

        Returns:
            The block's outputs for the first batch. None, with nothing done, when the block cannot be stopped
            in between (a matrix runs twice or not at all) or its waiting batches would be larger than MOST_WAITING.

        Raises:
            CalibrationError: a matrix saw no tokens, or numbers are not finite.
        """
        found = find_stages(matrices, self.call)
        # A waiting batch holds about three more tensors like its hidden states. Decided by sizes alone, never by what
        # memory there is, since the two ways to walk do not give the same bytes.
        if found is None or len(self.hidden) * (found.largest + 3 * self.hidden[0].nbytes) > MOST_WAITING:
            return None
        stages = found.stages
        before = first_output(found.output) if self.reference is None else self.reference
        collected: dict[int, InputStatistics] = {}

        def seen(stage: int, batch: int, x: Tensor) -> None:
            if stage not in collected:
                collected[stage] = InputStatistics.empty(x.shape[-1], x.device)
            collected[stage].add(self._real_tokens(batch)(x))

        def settle(stage: int) -> None:
            paths = stages[stage]
            statistics = collected.pop(stage, None) or InputStatistics.empty(1)
            statistics.finish(paths[0])
            solve(dict.fromkeys(paths, statistics))

        block = self._blocks[self.position]
        outputs = run_in_stages(matrices, stages, len(self.hidden), self.call, seen, settle, current, block)
        with closing(outputs):
            first = first_output(next(outputs) if not further else self._take(0, next(outputs)))
            if further:
                for batch, output in enumerate(outputs, 1):
                    self._take(batch, output)
                self._step()
        return Passed(before, first)

    def _take(self, batch: int, output: Any) -> Any:
        """Make a block's output the batch's hidden states; returns it."""
        hidden = first_output(output)
        if not torch.isfinite(hidden).all():
            raise CalibrationError(
                f"NaN or Inf in the output of block {self.position}; check the weights and the calibration data"
            )
        self.hidden[batch] = hidden
        for links in self._links:
            for block, place in links.values():
                if block == self.position:
                    self._handed[batch][block, place] = output[place]
        self._calls[batch][self.position] = Call((), {})
        return output

    def _step(self) -> None:
        self.position += 1
        self.reference = None

    def statistics_after(self, model: nn.Module, matrices: Mapping[str, nn.Module]) -> dict[str, InputStatistics]:
        """Second moments of the inputs of matrices that come after the stack, once every block was advanced."""
        if self.position != len(self._blocks):
            raise ValueError("statistics_after comes after the last advance")
        collector = _Collector(matrices)
        self._given = [[] for _ in self._batches]
        for batch, inputs in enumerate(self._batches):
            with collector.listening(self._real_tokens(batch)), suppress(_LastInputSeen):
                run_with_outputs(model, self._blocks, inputs, self.hidden[batch])
        return collector.finish()

    def _real_tokens(self, batch: int) -> Callable[[Tensor], Tensor]:
        """From a matrix's input to its rows that are not padding, of the encoder where cross attention reads that."""

        def real(x: Tensor) -> Tensor:
            if self._contexts and any(x is given for given in self._given[batch]):
                return _without_padding(x, self._contexts[batch])
            return _without_padding(x, self._masks[batch])

        return real

    def _arguments(self, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        call = self._calls[batch][self.position]
        args, kwargs = list(call.args), dict(call.kwargs)
        named: Any
        for named, link in self._links[self.position].items():
            if isinstance(named, int):
                args[named] = self._handed[batch][link]
            else:
                kwargs[named] = self._handed[batch][link]
        return tuple(self._cast(a) for a in args), {k: self._cast(v) for k, v in kwargs.items()}

    def _cast(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.to(self._dtype)
        if isinstance(value, tuple):
            return tuple(self._cast(v) for v in value)
        return value


def _without_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """The rows of a matrix's input that are not padding; some blocks merge batch and sequence before their MLP."""
    if mask is not None and x.shape[:2] == mask.shape:
        return x[mask]
    if mask is not None and x.dim() == 2 and x.shape[0] == mask.numel():
        return x[mask.reshape(-1)]
    return x


class _Collector:
    """Adds up the inputs of a block's matrices while it runs."""

    def __init__(self, matrices: Mapping[str, nn.Module]) -> None:
        self._matrices = dict(matrices)
        self._shared: dict[str, str] = {}  # path -> the path whose statistics it uses
        self._statistics: dict[str, InputStatistics] = {}
        self._order: list[str] = []
        self._last: str | None = None

    def listening(self, real_tokens: Callable[[Tensor], Tensor]) -> ExitStack:
        seen: list[tuple[Tensor, str]] = []
        stack = ExitStack()
        first = self._last is None

        def hook(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def add(_: nn.Module, args: tuple[Any, ...]) -> None:
                x = args[0]
                if first:
                    self._join(path, x, seen)
                owner = self._shared[path]
                if owner == path:
                    self._statistics[path].add(real_tokens(x))
                if path == self._last:
                    raise _LastInputSeen

            return add

        for path, module in self._matrices.items():
            stack.callback(module.register_forward_pre_hook(hook(path)).remove)
        stack.callback(self._settle)
        return stack

    def _join(self, path: str, x: Tensor, seen: list[tuple[Tensor, str]]) -> None:
        if path in self._shared:  # a matrix that runs twice in one forward adds to what it has
            return
        self._order.append(path)
        for other, owner in seen:
            if other is x:
                self._shared[path] = owner
                return
        self._shared[path] = path
        self._statistics[path] = InputStatistics.empty(x.shape[-1], x.device)
        seen.append((x, path))

    def _settle(self) -> None:
        if self._last is None and self._order:
            self._last = self._order[-1]

    def finish(self) -> dict[str, InputStatistics]:
        silent = [path for path in self._matrices if path not in self._shared]
        if silent:
            raise CalibrationError(f"{silent[0]} saw no calibration tokens; give more or other calibration data")
        for path, statistics in self._statistics.items():
            statistics.finish(path)
        return {path: self._statistics[owner] for path, owner in self._shared.items()}
