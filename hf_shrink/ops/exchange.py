"""A better set of inputs to remove: exchange a removed unit with a kept one as long as the quadratic loss falls.

With K kept and R removed, S the Schur complement H_RR - H_RK H_KK^-1 H_KR and V the best weights on K, taking a back
gains tr(r_a S_aa^-1 r_a^T) with r = W_R S; giving b away then costs what `ops/removal.py` says, of the weights and the
inverse updated for a. Both are known for all pairs from one factorisation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_shrink.ops.linalg import damped_cholesky, solve_positive

ENOUGH = 1e-6  # of the loss: an exchange that gains less is not worth a factorisation


def exchanged(
    weight: Tensor,
    moment: Tensor,
    damping: float,
    removed: Tensor,
    *,
    width: int = 1,
    groups: int | None = None,
    rounds: int = 8,
) -> Tensor:
    """The removed units after local exchanges, ascending; as many as before, and never with a larger loss.

    A round makes the best exchanges that share no unit all at once; where that does not pay, the better half of them.

    Args:
        weight, moment, damping, width, groups: as of `removal_curve`. With groups, units change places inside a row.
        removed: int64 (k,).
        rounds: factorisations at most.

    Raises:
        CalibrationError: NaN or Inf in the moment, or no damping helps.
    """
    lower, _ = damped_cholesky(moment, damping)
    problem = _Problem(weight.double(), lower @ lower.T, width)
    units = weight.shape[1] // width
    row = torch.arange(units, device=weight.device) // (units // groups) if groups else None
    best = removed.to(weight.device).sort().values
    if not 0 < len(best) < units:
        return best.cpu()
    state, most = problem.state(best), max(1, len(best) // 4)
    pairs = problem.pairs(state, row)
    for _ in range(rounds):
        if not pairs:
            break
        tried = problem.state(_with(best, pairs[:most]))
        if tried.loss < state.loss * (1 - ENOUGH):
            best, state = tried.removed, tried
            pairs = problem.pairs(state, row)
        elif most == 1:
            break
        else:
            most = min(most, len(pairs)) // 2 or 1
    return best.cpu()


def _with(removed: Tensor, pairs: list[tuple[int, int]]) -> Tensor:
    """The removed units with the first of each pair back and the second gone, ascending."""
    back = {a for a, _ in pairs}
    units = [u for u in removed.tolist() if u not in back] + [b for _, b in pairs]
    return torch.tensor(sorted(units), device=removed.device)


@dataclass(frozen=True)
class _State:
    """A set of removed units, and what follows from it. Matrices are in blocks of `width`, kept and removed units."""

    removed: Tensor
    kept: Tensor
    loss: float
    inverse: Tensor  # of H_KK
    reach: Tensor  # H_KK^-1 H_KR
    schur: Tensor
    weight: Tensor  # the best weights on the kept, (out, kept)
    residual: Tensor  # r, (out, removed)


@dataclass(frozen=True)
class _Problem:
    weight: Tensor
    moment: Tensor
    width: int

    def state(self, removed: Tensor) -> _State:
        units = self.weight.shape[1] // self.width
        there = torch.ones(units, dtype=torch.bool, device=removed.device)
        there[removed] = False
        kept = there.nonzero()[:, 0]
        inside, outside = there.repeat_interleave(self.width), (~there).repeat_interleave(self.width)
        lower = torch.linalg.cholesky(self.moment[inside][:, inside])
        across = self.moment[inside][:, outside]
        reach = torch.cholesky_solve(across, lower)
        schur = self.moment[outside][:, outside] - across.T @ reach
        lost = self.weight[:, outside]
        residual = lost @ schur
        loss = float((residual * lost).sum())
        weight = self.weight[:, inside] + lost @ reach.T
        return _State(removed, kept, loss, torch.cholesky_inverse(lower), reach, schur, weight, residual)

    def pairs(self, state: _State, row: Tensor | None) -> list[tuple[int, int]]:
        """(unit to take back, unit to give away), best first, that lower the loss; no unit in two of them."""
        change = self._changes(state)
        if row is not None:
            change = change.masked_fill(row[state.kept][:, None] != row[state.removed], float("inf"))
        gain = state.loss * ENOUGH
        candidates = (change < -gain).nonzero()
        order = change[candidates[:, 0], candidates[:, 1]].argsort(stable=True)
        kept, removed = state.kept.tolist(), state.removed.tolist()
        used: set[int] = set()
        found = []
        for place, gone in candidates[order].tolist():
            a, b = removed[gone], kept[place]
            if not used & {a, b}:
                used |= {a, b}
                found.append((a, b))
        return found

    def _changes(self, state: _State) -> Tensor:
        """float64 (kept, removed): by how much the loss changes when the one goes and the other comes back."""
        width, kept = self.width, len(state.kept)
        places = torch.arange(kept, device=state.kept.device)
        blocks = state.inverse.view(kept, width, kept, width)[places, :, places]
        columns = state.weight.T.reshape(kept, width, -1)
        grams = columns @ columns.mT
        changes = []
        for a in range(len(state.removed)):
            own = slice(a * width, (a + 1) * width)
            schur, residual = state.schur[own, own], state.residual[:, own]
            new = solve_positive(schur, residual.T).T  # a's weights once it is back, (out, width)
            reach = state.reach[:, own].reshape(kept, width, width)
            across = reach @ (new.T @ state.weight).T.reshape(kept, width, width).mT
            gram = grams - across - across.mT + reach @ (new.T @ new) @ reach.mT
            block = blocks + reach @ solve_positive(schur, reach.mT)
            if width == 1:
                cost = (gram / block)[:, 0, 0]
            else:
                cost = solve_positive(block, gram).diagonal(dim1=1, dim2=2).sum(-1)
            changes.append(cost - (new * residual).sum())
        return torch.stack(changes, dim=1)
