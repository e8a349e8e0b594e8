"""Block by block, everything that a plan says of a block before the next is touched."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_shrink.architectures.binding import bind
from hf_shrink.architectures.bound import BoundBlock, BoundStack
from hf_shrink.architectures.linears import is_matrix, matrix
from hf_shrink.calibration.before import statistics_before
from hf_shrink.calibration.dense_stream import DenseStream, widest_inputs
from hf_shrink.calibration.experts import starved_note
from hf_shrink.calibration.passed import Passed
from hf_shrink.calibration.precision import in_float32
from hf_shrink.calibration.statistics import InputStatistics
from hf_shrink.calibration.walk import StackWalk
from hf_shrink.pipeline.clock import Clock
from hf_shrink.pipeline.cutting import cut_and_refit, cut_tied_heads
from hf_shrink.pipeline.keeping import NOTHING_KEPT, Keeper
from hf_shrink.pipeline.kept import KeptStack
from hf_shrink.pipeline.learning import Learning
from hf_shrink.pipeline.masking import Masking
from hf_shrink.pipeline.narrowing import cut_and_pack
from hf_shrink.pipeline.packing import Task, solve_and_pack
from hf_shrink.pipeline.transforming import BlockScaler
from hf_shrink.plan import BlockPlan, Plan, Scheme
from hf_shrink.progress import ProgressCallback, working_on
from hf_shrink.quantization.base import QuantizationMethod
from hf_shrink.report import ShrinkReport
from hf_shrink.runtime.unpacked import kept_dense
from hf_shrink.sharding import ranks, share, whole
from hf_shrink.surgery import consumer_cuts, cut_block, cut_experts, stack_configs

COARSE = 4  # bits up to which a weight's error is far above what products in bfloat16 add


def _dtype(module: nn.Module) -> torch.dtype:
    return next(p.dtype for p in module.parameters() if p.is_floating_point())


@dataclass
class Run:
    """What stays the same from block to block."""

    model: nn.Module
    plan: Plan
    schemes: Mapping[str, Scheme]
    work: Sequence[str]  # paths of the matrices that are quantized, get zeros, or both
    method: QuantizationMethod | None
    masking: Masking | None
    scaler: BlockScaler
    batches: Sequence[Mapping[str, Any]]
    report: ShrinkReport
    progress: ProgressCallback
    total: int
    keeper: Keeper = NOTHING_KEPT
    done: int = 0
    walk: StackWalk | None = None
    learning: Learning | None = None
    dense: DenseStream | None = None  # where a method learns or follows, or matrices are refitted
    moved: float | None = None  # relative error of the last block's output

    def __post_init__(self) -> None:
        self.timed = Clock(self.report.seconds).timed
        self._at_work = ExitStack()  # until the block is done

    @property
    def solves(self) -> bool:
        """Whether anything is quantized, or gets zeros, by a method that needs statistics."""
        zeroes = self.masking is not None and self.masking.needs_statistics
        return zeroes or (bool(self.schemes) and self.method is not None and self.method.needs_statistics)

    @property
    def follows(self) -> bool:
        """Whether the method corrects for how far inputs have drifted from the dense model's."""
        return any(getattr(part, "follows_dense", False) for part in (self.method, self.masking))

    def between(self, stack: BoundStack, paths: Iterable[str]) -> list[str]:
        """Compress the matrices that run before `stack` outside the towers (a projector); returns their paths."""
        matrices = {p: module for p in paths if is_matrix(module := self.model.get_submodule(p))}
        if not matrices or not self.solves:
            return []
        with self.timed("calibrate"):
            found = statistics_before(self.model, stack.blocks[0].module, self.batches, matrices)
        for path, statistics in found.items():
            self.pack({path: statistics}, _dtype(matrices[path]))
        return list(found)

    def stack(
        self, stack: KeptStack, heads: Sequence[str], batches: Sequence[Mapping[str, Any]] | None = None
    ) -> dict[str, InputStatistics]:
        """Compress a stack's blocks; returns statistics of the matrices `heads` that come after it.

        Args:
            batches: a tower's, those that come to it; None: all.
        """
        solves = self.solves and (bool(heads) or any(path.startswith(stack.stack.path + ".") for path in self.work))
        refits = self.plan.refit and any(not plan.keeps_all for plan in stack.plan.blocks.values())
        self.walk, self.dense, self.moved = None, None, None
        stack, notes = cut_tied_heads(self.model, stack)
        self.report.notes += notes
        blocks = stack.stack.blocks
        widest = widest_inputs([block.module for block in blocks])
        done = self.keeper.restore(self, stack)
        scales = bool(self.scaler.scalings) and stack.stack.spec is not None
        if (solves or refits or scales) and (done < len(blocks) or (heads and solves)):
            given, modules = self.batches if batches is None else batches, [b.module for b in blocks]
            with self.timed("calibrate"):
                settings: dict[str, Any] = {
                    "starved_experts": self.plan.starved_experts,
                    "padded": batches is None,
                    "fast": (bool(self.schemes) or refits) and all(s.bits <= COARSE for s in self.schemes.values()),
                }
                # Who learns a block has to see all batches of it.
                settings["shared"] = (share if self.learning is None else whole)(len(given))
                self.walk = StackWalk(self.model, modules, given, **settings)
                if refits or (solves and (self.learning is not None or self.follows)):
                    everything = self.learning is not None or refits
                    settings |= {
                        "tokens": self.walk.tokens,
                        "widest": widest,
                        "everything": everything,
                        "measure_all": refits,
                    }
                    self.dense = DenseStream(self.model, modules, given, **settings)
        walks = {"walk": self.walk, "dense": None if self.dense is None else self.dense.walk}
        self.keeper.resume(stack, **walks)
        self.progress("compressing blocks", self.done, self.total)
        for place in range(done, len(blocks)):
            block, source = blocks[place], stack.kept[place]
            stored = _dtype(block.module)
            further = block.index + 1 < len(blocks) or bool(heads and solves)
            with in_float32(block.module, enabled=self.walk is not None), self._at_work:
                self._block(stack.stack, block, stack.plan.blocks.get(source, BlockPlan()), stored, further)
            self.moved = ranks().from_first(self.moved)  # on its first batch, which is the first of all
            if self.moved is not None:
                self.report.block_errors[f"{stack.stack.path}.{source}"] = self.moved
            self.done += 1
            self.keeper.finished(self, stack, place, **walks)
            self.progress("compressing blocks", self.done, self.total)
        if self.walk is not None and self.walk.starved:
            self.report.notes.append(starved_note(self.walk.starved))
        if not (heads and solves and self.walk is not None):
            return {}
        with self.timed("calibrate"):
            return self.walk.statistics_after(self.model, {p: self.model.get_submodule(p) for p in heads})

    def _block(self, stack: BoundStack, block: BoundBlock, plan: BlockPlan, stored: torch.dtype, further: bool) -> None:
        """Compress one block; with a walk, also send the batches through it if anything comes after (`further`)."""
        paths = [path for path in self.work if path.startswith(block.path + ".")]
        goes_along = self.follows and plan.keeps_all and bool(paths)  # through the block's stages, see `DenseStream`
        refits = self.walk is not None and self.plan.refit and bool(consumer_cuts(block, plan))
        if refits and self._cut_and_packed(block, plan, paths, stored, further):
            return
        dense = self.dense
        if dense is not None and not goes_along and (not refits or plan.experts is not None):
            with self.timed("calibrate"):
                dense.advance()
            dense = None
        if plan.experts is not None:
            cut_experts(self._now(stack, block), plan, stack_configs(self.model, stack)[0])
        if block.experts is not None:
            block = self._now(stack, block)
        if refits:
            assert self.walk is not None
            inputs, on = self.walk.hidden[0], further and not paths
            passed = cut_and_refit(self.model, block, plan, self.walk, dense, self.timed, further=on)
            if passed is not None and not paths:
                self.moved = passed.relative_error(inputs)
                return
        elif not plan.keeps_all:
            cut_block(block, plan)
        if self.scaler.scalings and paths:
            cut = block if plan.keeps_all else self._now(stack, block)
            with self.timed("transform"):
                self.scaler.scale(self.walk, stack.spec, cut, stored)
        if self.walk is None:
            self.pack(dict.fromkeys(paths), stored)
            return
        inputs = self.walk.hidden[0]
        if self.learning is not None and self.dense is not None and paths:
            walk = self.walk
            passed = self.learning.block(
                walk,
                self.dense,
                paths,
                lambda: self._pack_on_the_way(walk, paths, stored, False, goes_along),
                further,
                self.timed,
            )
        else:
            with self.timed("calibrate"):
                passed = self._pack_on_the_way(self.walk, paths, stored, further, goes_along)
        self.moved = None if passed is None else passed.relative_error(inputs)

    def _cut_and_packed(
        self, block: BoundBlock, plan: BlockPlan, paths: Sequence[str], stored: torch.dtype, further: bool
    ) -> bool:
        """Do everything in one pass where that can be, so that rounding follows the dense stream; whether it was."""
        walk, method = self.walk, self.method
        simple = block.experts is None and self.learning is None and self.masking is None and not self.scaler.scalings
        if walk is None or method is None or not (simple and paths and self.follows):
            return False
        if not getattr(method, "true_sequential", True):
            return False
        inputs = walk.hidden[0]
        modules = {path: self.model.get_submodule(path) for path in paths}

        def make(path: str, statistics: InputStatistics | None) -> Task:
            working_on(self.progress, path, len(matrix(modules[path])))
            return self._task(path, statistics, stored)

        found = cut_and_pack(
            self.model, block, plan, modules, make, method, walk, self.dense, self.timed, further=further
        )
        if found is None:
            return False
        passed, notes = found
        self.report.notes += notes
        self.moved = passed.relative_error(inputs)
        return True

    def _now(self, stack: BoundStack, block: BoundBlock) -> BoundBlock:
        """The block as it is bound at present: its experts may have been taken apart since, its units cut."""
        return bind(self.model).stack(stack.name).blocks[block.index]

    def _pack_on_the_way(
        self, walk: StackWalk, paths: Sequence[str], stored: torch.dtype, further: bool, goes_along: bool
    ) -> Passed | None:
        """Pack a block's matrices and go on to the next block; None when nobody looked at the block's output before."""

        def pack(found: Mapping[str, InputStatistics | None]) -> None:
            self.pack(found, stored)
            for path in found:  # all batches are still to go through what was packed
                self._at_work.enter_context(kept_dense(self.model.get_submodule(path)))

        modules = {path: self.model.get_submodule(path) for path in paths}
        if paths and self.solves:
            if getattr(self.method, "true_sequential", True):
                passed = walk.advance_in_stages(
                    modules,
                    pack,
                    self.model.get_submodule,
                    further=further,
                    dense=self.dense if goes_along else None,
                    in_place=self.masking is not None,
                )
                if passed is not None:
                    return passed
            if self.dense is not None and goes_along:
                self.dense.advance()
            statistics = walk.statistics(modules)
            pack({path: statistics.get(path) for path in modules})
        else:
            pack(dict.fromkeys(paths))
        before = walk.reference
        if further:
            walk.advance()
        if before is None:
            return None
        return Passed(before, walk.hidden[0] if further else walk.outputs(1)[0])

    def pack(self, statistics: Mapping[str, InputStatistics | None], stored: torch.dtype | None = None) -> None:
        """Zero and pack the matrices at the paths of `statistics`. `stored`: of scales; None: each module's own."""
        if not statistics:
            return
        with self.timed("solve"):
            rows = sum(len(matrix(self.model.get_submodule(path))) for path in statistics)
            working_on(self.progress, next(iter(statistics)), rows)
            statistics = self.masking.matrices(statistics) if self.masking is not None else statistics
            if self.method is not None:
                tasks = [self._task(path, found, stored) for path, found in statistics.items() if path in self.schemes]
                self.report.notes += solve_and_pack(self.model, tasks, self.method)

    def _task(self, path: str, statistics: InputStatistics | None, stored: torch.dtype | None) -> Task:
        module, sparse = self.model.get_submodule(path), self.masking is not None and path in self.masking.holders
        given = statistics if self.method is not None and self.method.needs_statistics else None
        return Task(path, module, self.schemes[path], given, stored or _dtype(module), sparse)
