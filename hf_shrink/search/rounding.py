"""What a scheme costs a piece: a real quantizer's output errors on some rows, weighted by the Fisher information.

Rows of a weight are solved independently given the statistics of its inputs, so that a sample of them tells what all
would lose. The inputs' second moment is taken twice: as the quantizer sees it, and with every token weighted by how
much the predictions depend on it, which is what its errors are measured with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_shrink.architectures.linears import matrix
from hf_shrink.calibration.statistics import InputStatistics
from hf_shrink.calibration.walk import StackWalk
from hf_shrink.plan import Scheme
from hf_shrink.quantization.base import METHODS, ModelMethod, QuantizationMethod
from hf_shrink.search.correcting import tried_blocks
from hf_shrink.search.fisher import Fisher
from hf_shrink.search.pieces import Piece
from hf_shrink.sharding import spread

EXPERTS = 8  # of a block's that are tried: the others cost as much for what the predictions make of their outputs
ROWS = 128  # of a stack of weights that share their input; of the larger ones about this many
COARSE = 4  # bits up to which the method itself is asked; of more, it gains on plain rounding what it gains there


@dataclass(frozen=True)
class Rounded:
    """What rounding costs a piece.

    Attributes:
        damage: nats a prediction, by scheme.
        rows: by path, float64 (out,), what errors of each row make of that, up to a factor.
        columns: by path, float64 (in,), the same by columns.
    """

    damage: Mapping[Scheme, float]
    rows: Mapping[str, Tensor]
    columns: Mapping[str, Tensor]


def rounding_damages(
    walk: StackWalk,
    pieces: Sequence[Piece],
    fisher: Fisher,
    method: QuantizationMethod,
    schemes: Sequence[Scheme],
    scale_dtype: torch.dtype,
    *,
    passing: bool,
) -> tuple[dict[str, Rounded], dict[str, InputStatistics]]:
    """What rounding costs the pieces of the walk's current block, by name, and the statistics of its matrices, by path.

    Args:
        fisher: taken on the walk's batches.
        schemes: a group size that does not divide a width is resolved by `Scheme.for_width`.
        passing: the walk goes on to the next block.
    """
    modules = {path: module for piece in pieces for path, module in piece.modules.items()}
    alike = {path: module for piece in pieces if not piece.routed for path, module in piece.modules.items()}
    weighted = _WeightedMoments(alike, fisher)
    with weighted.listening():
        statistics = walk.statistics(modules, passing=passing)
    walk.share.add_up(*(weighted.moments[path] for path in alike))
    found: dict[str, Rounded] = {}
    for piece in pieces:
        tried, factor = _tried(piece, statistics, fisher) if piece.routed else (piece, 1.0)
        costs = {}
        for path, module in tried.modules.items():
            moment = _plain(statistics.get(path), module) if piece.routed else weighted.mean(path)
            costs[path] = _of_matrix(path, module, moment, fisher)

        def lost(case: tuple[list[str], Scheme, bool], costs: Mapping[str, _MatrixCost] = costs) -> list[float]:
            paths, scheme, plainly = case
            rows = torch.cat([costs[path].weight for path in paths])
            seen = statistics.get(paths[0])
            solver = nearest() if plainly or seen is None else method
            solved = solver.solve(rows, scheme, seen, scale_dtype=scale_dtype)
            parts = torch.split(rows - solved.dequantized(), [len(costs[path].weight) for path in paths])
            return [costs[path].of(part) for path, part in zip(paths, parts, strict=True)]

        asked = _asked(schemes)
        cases = [(paths, scheme, plainly) for paths in sharing(tried, statistics) for scheme, plainly in asked]
        damage = dict.fromkeys(asked, 0.0)
        for (_, scheme, plainly), found_here in zip(cases, spread(cases, lost), strict=True):
            damage[scheme, plainly] += factor * sum(found_here)
        found[piece.name] = Rounded(
            _by_scheme(damage, schemes),
            {path: cost.by_row() for path, cost in costs.items()},
            {path: cost.by_column() for path, cost in costs.items()},
        )
    return found, statistics


@dataclass(frozen=True)
class _MatrixCost:
    """What errors of one matrix cost.

    Attributes:
        whole: float32 (out, in), the matrix.
        weight: float32 (k, in), the rows that are tried.
        gradients: float64 (out,), the sum of g_tr^2 over tokens.
        own: float64 (k,), the same of the rows that are tried.
        moment: float32 (in, in), the mean over tokens, weighted by the sum of g_tr^2 over rows, of x x^T.
        predictions: how many predictions these gradients are of.
    """

    whole: Tensor
    weight: Tensor
    gradients: Tensor
    own: Tensor
    moment: Tensor
    predictions: int

    def of(self, lost: Tensor) -> float:
        """Nats a prediction for errors `lost` (k, in) of the rows that are tried, taken to all rows."""
        errors = (lost @ self.moment * lost).sum(1, dtype=torch.float64)
        mean = float((errors * self.own).sum() / self.own.sum().clamp_min(1e-300))
        return 0.5 * mean * float(self.gradients.sum()) / self.predictions

    def by_row(self) -> Tensor:
        """float64 (out,): a row's steps are as large as its weights."""
        return (self.gradients * self.whole.square().sum(1, dtype=torch.float64)).cpu()

    def by_column(self) -> Tensor:
        """float64 (in,)."""
        return self.moment.diagonal().double().cpu()


def _asked(schemes: Sequence[Scheme]) -> list[tuple[Scheme, bool]]:
    """What is rounded: by the method what is coarse, plainly (True) what is finer, and one scheme in both ways."""
    coarse = [scheme for scheme in schemes if scheme.bits <= COARSE]
    finer = [scheme for scheme in schemes if scheme.bits > COARSE]
    both = _anchor(schemes)
    by_method = coarse or [both]
    return [*((scheme, False) for scheme in by_method), *((s, True) for s in dict.fromkeys([both, *finer]) if finer)]


def _anchor(schemes: Sequence[Scheme]) -> Scheme:
    """The scheme that says what the method gains on plain rounding: the finest of the coarse ones, or the coarsest."""
    coarse = [scheme for scheme in schemes if scheme.bits <= COARSE]
    return max(coarse, key=lambda scheme: scheme.bits) if coarse else min(schemes, key=lambda scheme: scheme.bits)


def _by_scheme(damage: Mapping[tuple[Scheme, bool], float], schemes: Sequence[Scheme]) -> dict[Scheme, float]:
    """Damages by the method: of finer schemes those of plain rounding, times what the method leaves of it."""
    anchor = _anchor(schemes)
    plain = damage.get((anchor, True), 0.0)
    left = damage[anchor, False] / plain if plain > 0 else 1.0
    return {s: damage[s, False] if (s, False) in damage else left * damage[s, True] for s in schemes}


def nearest() -> QuantizationMethod:
    """Plain rounding, which needs no data."""
    method = METHODS.build("rtn", {})
    assert not isinstance(method, ModelMethod)
    return method


def _tried(piece: Piece, statistics: Mapping[str, InputStatistics], fisher: Fisher) -> tuple[Piece, float]:
    """Some experts of a piece, spread over how much depends on them; and by what all are more than these.

    Of those that saw enough tokens for statistics, or of all where none did.
    """
    masses: dict[str, float] = {}
    for path in piece.modules:
        expert = path.rpartition(".")[0]
        masses[expert] = masses.get(expert, 0.0) + float(fisher.outputs[path].rows.sum())
    known = {path.rpartition(".")[0] for path in piece.modules if path in statistics}
    order = sorted(known or masses, key=lambda expert: (masses[expert], expert))
    chosen = {order[place] for place in tried_blocks(len(order), EXPERTS)}
    mass = sum(masses[expert] for expert in chosen)
    modules = {path: module for path, module in piece.modules.items() if path.rpartition(".")[0] in chosen}
    return replace(piece, modules=modules), sum(masses.values()) / mass if mass > 0 else 1.0


def _plain(statistics: InputStatistics | None, module: nn.Module) -> Tensor:
    """The mean of x x^T over an expert's tokens. They count alike: which ones it gets may differ from pass to pass.

    Without statistics as if its inputs were independent and of size 1; trials correct for what they are.
    """
    weight = matrix(module)
    return torch.eye(weight.shape[1], device=weight.device) if statistics is None else statistics.mean


def _of_matrix(path: str, module: nn.Module, moment: Tensor, fisher: Fisher) -> _MatrixCost:
    """`moment`: a mean."""
    whole = matrix(module).detach().float()
    gradients = fisher.outputs[path].rows.to(whole.device)
    step = max(1, len(whole) // ROWS)
    return _MatrixCost(whole, whole[::step], gradients, gradients[::step], moment, fisher.predictions)


def sharing(piece: Piece, statistics: Mapping[str, InputStatistics]) -> list[list[str]]:
    """The piece's paths, together where they read the same input; those without statistics by themselves."""
    groups: dict[int, list[str]] = {}
    for place, path in enumerate(piece.modules):
        groups.setdefault(id(statistics[path]) if path in statistics else -place, []).append(path)
    return list(groups.values())


class _WeightedMoments:
    """Sums over tokens t of (sum over rows of g_tr^2) x_t x_t^T, added up while a block runs.

    Attributes:
        moments: float32 (in, in), by path.
    """

    def __init__(self, modules: Mapping[str, nn.Module], fisher: Fisher) -> None:
        self._modules = modules
        self._fisher = fisher
        self._seen = dict.fromkeys(modules, 0)
        self.moments: dict[str, Tensor] = {}

    def mean(self, path: str) -> Tensor:
        """The weighted mean of x x^T, once the block has run on everything."""
        total = float(self._fisher.outputs[path].rows.sum())
        return self.moments[path] / total if total > 0 else self.moments[path]

    def listening(self) -> ExitStack:
        stack = ExitStack()
        for path, module in self._modules.items():
            stack.callback(module.register_forward_pre_hook(self._hook(path)).remove)
        return stack

    def _hook(self, path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(_: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            rows = x.detach().reshape(-1, x.shape[-1]).float()
            weights = self._fisher.outputs[path].tokens[self._seen[path]].to(rows.device)
            self._seen[path] += 1
            if path not in self.moments:
                self.moments[path] = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
            self.moments[path].addmm_((rows * weights[:, None]).T, rows)

        return add
