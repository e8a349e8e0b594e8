"""What options make of weights, made when first asked for and kept: cut, refitted and rounded on the dense model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_shrink.architectures.binding import Binding
from hf_shrink.architectures.bound import BoundBlock, BoundStack
from hf_shrink.architectures.linears import bias_of, is_matrix
from hf_shrink.calibration.precision import float32_for_now
from hf_shrink.calibration.shelf import Shelf
from hf_shrink.calibration.statistics import InputStatistics
from hf_shrink.calibration.walk import StackWalk
from hf_shrink.plan import Scheme
from hf_shrink.progress import ProgressCallback, quiet
from hf_shrink.pruning.refit import LONGEST, refit_reader
from hf_shrink.quantization.base import METHODS, ModelMethod, QuantizationMethod
from hf_shrink.search.options import Problem
from hf_shrink.search.outer import head_statistics
from hf_shrink.surgery import consumer_cuts

IN_MEMORY = 2**30  # bytes of statistics and weights that are kept in memory; the rest waits in a file
KEPT_DTYPE = torch.bfloat16  # measurements multiply in it


class RoundedWeights:
    """The `measured.Replacements` of a problem.

    Matrices are cut, refitted and rounded on the dense model's inputs, each alone: a little worse than what a run makes
    of them, which sees what the compressed blocks before put out, but alike for all options, and made only once.

    Args:
        method: rounds matrices.
        statistics: by path, of the inputs of all matrices that options round or cut, from `input_statistics`.
        shelf: that they wait on.
    """

    def __init__(
        self,
        model: nn.Module,
        binding: Binding,
        problem: Problem,
        method: QuantizationMethod,
        statistics: Mapping[str, InputStatistics],
        shelf: Shelf,
    ) -> None:
        self._model = model
        self._problem = problem
        self._method = method
        self._statistics = statistics
        self._blocks = {(stack.name, block.index): block for stack in binding.stacks for block in stack.blocks}
        self._shelf = shelf
        self._made: dict[tuple[Any, ...], tuple[int, dict[str, Tensor]]] = {}
        # Paths and dense weights as they are now: later the model may have others in their places.
        paths = {path for group in problem.groups for option in group.options for path in option.change.schemes}
        paths |= {path for group in range(len(problem.groups)) for path in self._readers(group)}
        self._modules = {path: model.get_submodule(path) for path in sorted(paths)}
        self._dense: dict[str, Tensor] = {path: model.get_parameter(f"{path}.weight").data for path in self._modules}
        holders: dict[int, list[str]] = {}
        for path, module in self._modules.items():
            holders.setdefault(id(module.weight), []).append(path)
        # A tied weight is rounded once: as the head's, whose inputs are known.
        self._rounded_as = {p: next((q for q in tied if q in statistics), p) for tied in holders.values() for p in tied}
        self._biases = {path: bias_of(module) for path, module in self._modules.items() if is_matrix(module)}

    def weights(self, group: int, option: int) -> dict[str, Tensor]:
        """See `Replacements.weights`; in bfloat16."""
        change = self._problem.groups[group].options[option].change
        if change.dropped:
            return {}
        cuts: dict[str, Tensor] = {}
        block = self._block(group)
        if block is not None and not change.block.keeps_all:
            cuts = consumer_cuts(block, change.block)
        found: dict[str, Tensor] = {}
        for path in dict.fromkeys(self._rounded_as[path] for path in (*change.schemes, *cuts)):
            found |= self._of(path, change.schemes.get(path), cuts.get(path))
        return found

    def _readers(self, group: int) -> set[str]:
        """The matrices that lose inputs under some option of a group."""
        block = self._block(group)
        if block is None:
            return set()
        changes = [option.change for option in self._problem.groups[group].options]
        return {path for c in changes if not c.dropped for path in consumer_cuts(block, c.block)}

    def _block(self, group: int) -> BoundBlock | None:
        found = self._problem.groups[group]
        return None if found.stack is None or found.block is None else self._blocks[found.stack, found.block]

    def _of(self, path: str, scheme: Scheme | None, kept: Tensor | None) -> dict[str, Tensor]:
        """A matrix's parameters by path."""
        key = (path, scheme, None if kept is None else tuple(kept.tolist()))
        if key not in self._made:
            statistics = self._statistics.get(path)
            if statistics is not None:
                self._shelf.give_back(id(statistics))
            found = self._make(path, scheme, kept, statistics)
            if statistics is not None:
                self._shelf.take(id(statistics), [statistics.hessian])
            self._made[key] = len(self._made), {name: tensor.to(KEPT_DTYPE) for name, tensor in found.items()}
        owner, made = self._made[key]
        self._shelf.give_back(owner)
        copies = {name: tensor.clone() for name, tensor in made.items()}
        self._shelf.take(owner, list(made.values()))
        return copies

    def _make(
        self, path: str, scheme: Scheme | None, kept: Tensor | None, statistics: InputStatistics | None
    ) -> dict[str, Tensor]:
        module, dense = self._modules[path], self._dense[path]
        if not is_matrix(module):  # an embedding: no inputs to have statistics of
            assert scheme is not None
            return {f"{path}.weight": self._rounded(dense.float(), scheme, None)}
        turned = isinstance(module, Conv1D)
        weight, bias = (dense.t() if turned else dense).float(), self._biases[path]
        found: dict[str, Tensor] = {}
        if kept is not None:
            small = weight[:, kept.to(weight.device)]
            if statistics is not None:  # else an expert that hardly a token comes to
                refitted = refit_reader(weight, bias, statistics, kept)
                if refitted.bias is not None:
                    found[f"{path}.bias"] = refitted.bias
                small = refitted.weight
            if scheme is not None:
                small = self._rounded(small, scheme, None if statistics is None else statistics.narrowed(kept))
            whole = torch.zeros_like(weight)
            whole[:, kept.to(weight.device)] = small
        else:
            assert scheme is not None
            whole = self._rounded(weight, scheme, statistics)
        found[f"{path}.weight"] = (whole.t() if turned else whole).contiguous()
        return found

    def _rounded(self, weight: Tensor, scheme: Scheme, statistics: InputStatistics | None) -> Tensor:
        method = self._method
        if statistics is None and method.needs_statistics:
            data_free = METHODS.build("rtn", {})
            assert not isinstance(data_free, ModelMethod)
            method = data_free
        return method.solve(weight, scheme, statistics, scale_dtype=torch.float32).dequantized()


def input_statistics(
    model: nn.Module,
    stacks: Sequence[BoundStack],
    paths: set[str],
    batches: Sequence[Mapping[str, Any]],
    shelf: Shelf,
    progress: ProgressCallback = quiet,
    *,
    heads: bool = False,
) -> dict[str, InputStatistics]:
    """Second moments of the dense model's inputs to the matrices at `paths` inside the stacks' blocks.

    They are put on the shelf, each under the id of its object. Experts that saw too few tokens have none.

    Args:
        heads: also of the inputs to the output head.
    """
    found: dict[str, InputStatistics] = {}
    total = sum(len(stack.blocks) for stack in stacks)
    done = 0
    for stack in stacks:
        modules = [block.module for block in stack.blocks]
        walk = StackWalk(model, modules, batches, starved_experts="rtn", fast=True)
        for block in stack.blocks:
            progress("reading inputs", done, total)
            inside = {path: model.get_submodule(path) for path in paths if path.startswith(block.path + ".")}
            with float32_for_now(block.module):
                ends = block is stack.blocks[-1]
                heads_follow = heads and ends and stack is stacks[-1]
                passing = heads_follow or not ends
                if inside:
                    found |= walk.statistics(inside, LONGEST, passing=passing)
                elif passing:
                    walk.advance()
                if heads_follow:
                    found |= head_statistics(model, walk)
            for own in found.values():
                shelf.take(id(own), [own.hessian])
            done += 1
    progress("reading inputs", total, total)
    return found
