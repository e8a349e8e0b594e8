"""The dense model's hidden states, carried along beside the compressed model's."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from hf_shrink.calibration.shelf import IN_MEMORY
from hf_shrink.calibration.stages import StagedRun
from hf_shrink.calibration.walk import StackWalk
from hf_shrink.residence import Room
from hf_shrink.sharding import Share, share

HELD_OUT = 8  # one batch in so many is kept to check corrections with
ENOUGH = 12  # tokens a column of the widest matrix, with which drift is measured well


class DenseStream:
    """What the dense blocks put out, for all of a walk's batches or some of them.

    Attributes:
        walk: over the same blocks; only ever advanced through dense blocks, so that after a block its hidden states
            are what the dense block put out.
        held_out: batches of the compressed walk with which corrections are checked, the last eighth (none of one).

    Batches are called by their place among those that this process has of the compressed walk.

    Args:
        model, blocks, batches: as of the compressed walk, when that is made.
        shared: the compressed walk's; None: as `sharding.share` says.
        tokens: in all batches.
        widest: inputs of the blocks' matrix with the most, which says how many batches are followed. None: of these
            blocks. A run that goes on has packed ones, which no longer say it.
        everything: follow all batches. Otherwise those held out and at most half of the others, fewer where `ENOUGH`
            tokens come together sooner: so many are enough to measure how far inputs have drifted.
        measure_all: measure it on all batches that are followed.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        batches: Sequence[Mapping[str, Any]],
        *,
        shared: Share | None = None,
        tokens: int,
        widest: int | None = None,
        everything: bool,
        measure_all: bool = False,
        **settings: Any,
    ) -> None:
        count = len(batches)
        shared = share(count) if shared is None else shared
        held = -(-count // HELD_OUT) if count > 1 else 0
        held_out = range(count - held, count)
        sparing = max(2, tokens // (ENOUGH * (widest or widest_inputs(blocks))))
        measured = {*held_out, *range(0, count - held, 1 if measure_all else sparing)}
        followed = range(count) if everything else sorted(measured)
        among = shared.among(followed)
        places = {followed[number]: place for place, number in enumerate(among.own)}
        own = dict(enumerate(shared.own))
        self.held_out = frozenset(batch for batch, number in own.items() if number in held_out)
        self._measured = frozenset(batch for batch, number in own.items() if number in measured)
        self._place = {batch: places[number] for batch, number in own.items() if number in places}
        given = [batches[number] for number in followed]
        self.walk = StackWalk(model, blocks, given, room=Room(IN_MEMORY), shared=among, **settings)

    def advance(self) -> None:
        """Run the current block, which must still be dense, on every batch followed."""
        self.walk.advance()

    @contextmanager
    def following(
        self,
        block: nn.Module,
        matrices: Mapping[str, nn.Module],
        stages: Sequence[Sequence[str]],
        *,
        copies: bool = True,
    ) -> Iterator[Follower]:
        """Go through a copy of the current block stage by stage, while the block itself is compressed.

        At the end every batch followed is through the dense block. `copies`: of the weights too, which may change;
        otherwise only modules are put in the place of others.
        """
        plain = () if copies else [p for p in block.parameters() if type(p) is nn.Parameter]
        twin = copy.deepcopy(block, {id(p): nn.Parameter(p.data, p.requires_grad) for p in plain})
        names = {id(module): name for name, module in block.named_modules()}
        twins = {path: twin.get_submodule(names[id(module)]) for path, module in matrices.items()}
        self.walk.stand_in(twin)
        with self.walk.staged(twins, stages, twins.__getitem__, twin) as run:
            yield Follower(self, run)
            for place in self._place.values():
                self.walk.take(place, run.finish(place))
        self.walk.stand_in(block)  # the twin is over
        self.walk.step()

    def measured_place(self, batch: int) -> int | None:
        """Where a batch of the compressed walk is in `walk`; None when its drift is not measured."""
        return self._place[batch] if batch in self._measured else None

    def target(self, batch: int) -> Tensor:
        """The last dense block's output for a batch of the compressed walk, (batch, sequence, width)."""
        return self.walk.hidden[self._place[batch]]


class Follower:
    """The dense stream inside one block."""

    def __init__(self, stream: DenseStream, run: StagedRun) -> None:
        self._stream, self._run = stream, run

    def real_input(self, batch: int, stage: int) -> Tensor | None:
        """The dense block's input of a stage, without padding, for a batch whose drift is measured."""
        place = self._stream.measured_place(batch)
        if place is None:
            return None
        x = self._run.reach(place, stage)
        return None if x is None else self._stream.walk.real_tokens(place)(x)

    def rest(self, batch: int) -> None:
        """Nobody looks at the batch for a while; what `real_input` gave must not be read any more."""
        place = self._stream.measured_place(batch)
        if place is not None:
            self._run.rest(place)

    def is_held_out(self, batch: int) -> bool:
        """Whether the batch is one to check corrections with."""
        return batch in self._stream.held_out


def widest_inputs(blocks: Sequence[nn.Module]) -> int:
    """The inputs of the matrix with the most."""
    widths = (weight.shape[-1] for block in blocks for weight in block.parameters() if weight.dim() > 1)
    return max(widths, default=1)
