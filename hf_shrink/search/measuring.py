"""One pass over a model that finds what everything in it is worth: see `sensitivity.py` for what comes out.

- Rounding: from statistics and gradients (`rounding.py`), times what a few true trials say of each kind of piece.
- Width: every part's curve in nats, by one true trial a part (`pruning/scorer.py`).
- Depth, embeddings, heads: true trials.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_shrink.architectures.binding import Binding
from hf_shrink.architectures.bound import BoundAttention, BoundMlp
from hf_shrink.architectures.linears import is_matrix, matrix
from hf_shrink.calibration.precision import float32_for_now
from hf_shrink.calibration.shelf import Shelf
from hf_shrink.calibration.statistics import InputStatistics
from hf_shrink.calibration.walk import StackWalk
from hf_shrink.plan import Scheme
from hf_shrink.progress import ProgressCallback, quiet
from hf_shrink.pruning.base import WIDTH, Look
from hf_shrink.pruning.curves import PartCurves
from hf_shrink.pruning.items import Items
from hf_shrink.pruning.measure import MeasuredModel
from hf_shrink.pruning.plan_width import unit_curves
from hf_shrink.pruning.samples import choose
from hf_shrink.pruning.scorer import Scorer
from hf_shrink.pruning.trials import Trials
from hf_shrink.quantization.base import QuantizationMethod
from hf_shrink.recipe import PruneStep
from hf_shrink.search.correcting import Corrections, tried_blocks, tried_schemes
from hf_shrink.search.cuts import prunable_units
from hf_shrink.search.fisher import Fisher, output_gradients
from hf_shrink.search.outer import head_of, head_statistics, outer_weights
from hf_shrink.search.pieces import Piece, find_pieces
from hf_shrink.search.rounding import COARSE, Rounded, nearest, rounding_damages, sharing
from hf_shrink.search.sensitivity import Rounding, Sensitivity

TOKENS = 8192  # for statistics and gradients
TRIED_BLOCKS = 6  # of a stack, whose pieces are tried in truth
WIDTH_TRIAL = 0.2  # of a part's units go in the trial that turns its curve into nats
LOOK = Look(tokens=2048, predictions=512, fast=True)  # of depth trials


@dataclass(frozen=True)
class Space:
    """What may be done to a model.

    Attributes:
        schemes: that weights may get.
        width, depth: whether units, whole blocks may go.
        embeddings: whether embeddings and output heads may be quantized.
        portable: only what stock transformers can load: the same counts in all blocks, no parts taken out, no packed
            embeddings.
    """

    schemes: tuple[Scheme, ...]
    width: bool = True
    depth: bool = True
    embeddings: bool = True
    portable: bool = True


def measure(
    model: nn.Module,
    binding: Binding,
    space: Space,
    method: QuantizationMethod | None,
    quantizable: Collection[str],
    batches: Sequence[Mapping[str, Any]],
    *,
    seed: int = 0,
    scale_dtype: torch.dtype = torch.float32,
    progress: ProgressCallback = quiet,
) -> Sensitivity:
    """Measure a dense model, which is left as it was.

    Args:
        binding: of the model.
        method: that weights will be rounded by; None: there are no schemes.
        quantizable: paths of the matrices inside blocks that may be quantized.
        batches: model inputs; about TOKENS tokens of them are used.
        scale_dtype: of the scales that will be stored.

    Raises:
        ArchitectureError: the model's parts cannot be left out.
        CalibrationError: no data, or numbers that are not finite.
    """
    started = time.perf_counter()
    chosen = choose(batches, TOKENS, seed)
    trials = Trials(model, binding, batches, seed + 1)  # other samples: what statistics are of, they flatter
    run = _Measuring(model, binding, space, method, chosen, trials, seed, scale_dtype, progress)
    pieces = find_pieces(binding, quantizable) if space.schemes else ()
    found = Sensitivity(
        rounding=run.rounding(pieces) if pieces and method is not None else {},
        outer=run.outer() if space.embeddings else {},
        curves=run.curves() if space.width and binding.family is not None else {},
        dropped=run.dropped(batches) if space.depth and binding.family is not None else {},
        factors=run.corrections.table(),
    )
    return replace(found, seconds=time.perf_counter() - started)


@dataclass(frozen=True)
class _Trial:
    """Whole rounded weights of a piece, by path, whose divergence is to be measured."""

    piece: Piece
    scheme: Scheme
    weights: list[tuple[str, Tensor]]


@dataclass
class _Measuring:
    model: nn.Module
    binding: Binding
    space: Space
    method: QuantizationMethod | None
    batches: Sequence[Mapping[str, Any]]
    trials: Trials
    seed: int
    scale_dtype: torch.dtype
    progress: ProgressCallback
    corrections: Corrections = field(default_factory=Corrections)
    heads: dict[str, InputStatistics] = field(default_factory=dict)

    def rounding(self, pieces: Sequence[Piece]) -> dict[str, Rounding]:
        """What every scheme costs every piece, corrected."""
        matrices = {path: module for piece in pieces for path, module in piece.modules.items()}
        blocks = [block.module for block in self.binding.blocks]
        routed = {path for piece in pieces if piece.routed for path in piece.modules}
        fisher = output_gradients(self.model, blocks, matrices, self.batches, self.seed, self.progress, routed)
        found: dict[str, Rounding] = {}
        done = 0
        for stack in self.binding.stacks:
            modules = [block.module for block in stack.blocks]
            inside = [piece for piece in pieces if piece.key[0] == stack.name]
            if not inside:
                continue
            walk = StackWalk(self.model, modules, self.batches, starved_experts="rtn", fast=True)
            assert self.method is not None
            heads = self.space.embeddings and self.method.needs_statistics
            last = heads and stack is self.binding.stacks[-1]
            tried = tried_blocks(len(modules), TRIED_BLOCKS)
            for block in stack.blocks:
                self.progress("measuring what bits are worth", done, len(blocks))
                own = [piece for piece in inside if piece.key[1] == block.index]
                changes: list[_Trial] = []
                with float32_for_now(block.module):
                    passing = last or block.index + 1 < len(modules)
                    if own:
                        self._block(walk, own, fisher, found, changes if block.index in tried else None, passing)
                    elif passing:
                        walk.advance()
                for trial in changes:
                    places = [(matrix(matrices[path]), weight) for path, weight in trial.weights]
                    predicted = found[trial.piece.name].damage[trial.scheme]
                    self.corrections.add(
                        trial.piece, trial.scheme, predicted, self.trials.divergence_of(places, trial.piece.key)
                    )
                done += 1
            if last:
                self.heads = head_statistics(self.model, walk)
        self.progress("measuring what bits are worth", len(blocks), len(blocks))
        return {piece.name: self.corrections.applied(found[piece.name], piece) for piece in pieces}

    def _block(
        self,
        walk: StackWalk,
        pieces: Sequence[Piece],
        fisher: Fisher,
        found: dict[str, Rounding],
        changes: list[_Trial] | None,
        passing: bool,
    ) -> None:
        """Predictions for a block's pieces into `found`; for `changes`, whole rounded weights to try.

        `passing`: the walk goes on to the next block.
        """
        assert self.method is not None
        schemes = self.space.schemes
        rounded, statistics = rounding_damages(
            walk, pieces, fisher, self.method, schemes, self.scale_dtype, passing=passing
        )
        for piece in pieces:
            own = rounded[piece.name]
            found[piece.name] = Rounding(own.damage, self._units(piece, own))
            if changes is not None:
                for scheme in tried_schemes(schemes, COARSE):
                    changes.append(_Trial(piece, scheme, self._whole(piece, scheme, statistics)))

    def _whole(
        self, piece: Piece, scheme: Scheme, statistics: Mapping[str, InputStatistics]
    ) -> list[tuple[str, Tensor]]:
        """The piece's weights, rounded."""
        assert self.method is not None
        weights: list[tuple[str, Tensor]] = []
        for paths in sharing(piece, statistics):
            dense = [matrix(piece.modules[path]).float() for path in paths]
            seen = statistics.get(paths[0])
            method = nearest() if seen is None else self.method
            solved = method.solve(torch.cat(dense), scheme, seen, scale_dtype=self.scale_dtype)
            weights += zip(paths, torch.split(solved.dequantized(), [len(weight) for weight in dense]), strict=True)
        return weights

    def _units(self, piece: Piece, rounded: Rounded) -> Tensor | None:
        """The share of each unit in what rounding costs: heads share what their KV group's keys and values cost."""
        if piece.part is None:
            return None
        block = self.binding.stack(piece.key[0]).blocks[piece.key[1]]
        part: BoundAttention | BoundMlp = getattr(block, piece.part)
        units = part.channels if isinstance(part, BoundMlp) else part.heads
        found = torch.zeros(units, dtype=torch.float64)
        for slot in part.slots:
            if slot.path in piece.modules:
                costs = rounded.rows[slot.path] if slot.axis == "out" else rounded.columns[slot.path]
                own = costs[slot.index].sum(1)
                repeats = units // len(own)
                found += own.repeat_interleave(repeats) / repeats
        total = float(found.sum())
        return found / total if total > 0 else torch.full_like(found, 1 / units)

    def curves(self) -> dict[tuple[str, int, str], PartCurves]:
        """What units cost, in nats."""
        prunable = prunable_units(self.model, self.binding, portable=self.space.portable)
        if prunable is None:
            return {}
        step = PruneStep("width", "obs", ratio=WIDTH_TRIAL)
        method = WIDTH.build("obs", {"exchanges": 0})
        with Shelf() as shelf:
            scorer = Scorer(method, step, shelf, trials=self.trials)
            found = unit_curves(self.model, self.binding, prunable, scorer, self.batches, self.progress)
        return {(stack, index, kind): curves for (stack, index, kind), curves in found.items()}

    def dropped(self, batches: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int, str | None], float]:
        """What it costs to leave out each block, or each part of one where stock need not load the result."""
        found: dict[tuple[str, int, str | None], float] = {}
        for parts in ("blocks",) if self.space.portable else ("blocks", "any"):
            items = Items(self.model, self.binding, parts)
            numbers = [n for n in range(len(items.all)) if items.allowed([n])]
            measured = MeasuredModel(self.model, items, batches, self.seed, self.progress)
            costs = measured.divergences([], [[n] for n in numbers], LOOK) if numbers else []
            for number, cost in zip(numbers, costs, strict=True):
                item = items.all[number]
                found[item.stack.name, item.block.index, item.part] = cost
        return found

    def outer(self) -> dict[str, dict[Scheme, float]]:
        """What it costs to round the embedding and the head, by the first path of each weight."""
        found: dict[str, dict[Scheme, float]] = {}
        for paths in outer_weights(self.model):
            module = self.model.get_submodule(paths[0])
            place = matrix(module) if is_matrix(module) else module.weight
            assert isinstance(place, Tensor)
            place = place.detach()
            statistics = self.heads.get(head_of(self.model, paths) or "")
            for scheme in self.space.schemes:
                self.progress("trying embeddings", 0, 1)
                method, seen = (nearest(), None) if statistics is None else (self.method, statistics)
                assert method is not None  # else there are no schemes
                solved = method.solve(place.float(), scheme, seen, scale_dtype=self.scale_dtype)
                found.setdefault(paths[0], {})[scheme] = self.trials.divergence_of([(place, solved.dequantized())])
        self.progress("trying embeddings", 1, 1)
        return found
