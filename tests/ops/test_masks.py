"""Masks: exact counts, ties, thresholds; ranks over many tensors; least squares on a mask against float64."""

from __future__ import annotations

import pytest
import torch

from hf_shrink.errors import CalibrationError, RecipeError
from hf_shrink.ops.masks import pruned, pruned_of_each, refit_kept, shared_counts, smallest
from hf_shrink.sparsity import Amount


def slow_smallest(row: torch.Tensor, count: int) -> torch.Tensor:
    order = sorted(range(len(row)), key=lambda i: (float(row[i]), i))
    mask = torch.zeros(len(row), dtype=torch.bool)
    mask[order[:count]] = True
    return mask


@pytest.mark.parametrize("count", [0, 1, 7, 19, 20])
def test_the_smallest_of_each_row_are_exactly_that_many_and_first_among_equals(count: int) -> None:
    torch.manual_seed(0)
    values = torch.randint(0, 5, (11, 20)).float()  # ties everywhere
    values[0] = 3.0
    values[1, :9] = float("inf")
    expected = torch.stack([slow_smallest(row, count) for row in values])
    assert torch.equal(smallest(values, count), expected)


@pytest.mark.parametrize(("kept", "size"), [(2, 4), (1, 4), (4, 8), (3, 5), (1, 2)])
def test_n_of_every_m_are_kept_even_where_all_are_equal(kept: int, size: int) -> None:
    torch.manual_seed(0)
    values = torch.randn(6, 40).abs()
    values[2] = 0.0
    gone = pruned_of_each(values, kept, size)
    groups = gone.view(6, -1, size)
    assert (groups.sum(-1) == size - kept).all()
    lowest_kept = values.view_as(groups).masked_fill(groups, torch.inf).amin(-1)
    highest_gone = values.view_as(groups).masked_fill(~groups, -torch.inf).amax(-1)
    assert (highest_gone <= lowest_kept).all()


def test_a_threshold_takes_ties_and_nothing_above() -> None:
    values = torch.tensor([[0.1, 0.2, 0.2, 0.3], [0.2, 0.0, 0.25, 1.0]])
    above = torch.nextafter(torch.tensor(0.2), torch.tensor(1.0))
    values[1, 2] = above
    gone = pruned(values, Amount(threshold=0.2), False)
    assert gone.int().tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
    assert not pruned(values, Amount(threshold=-1.0), False).any()
    assert torch.equal(pruned(values.bfloat16(), Amount(threshold=0.1), False), values.bfloat16().float() <= 0.1)


@pytest.mark.parametrize(("sparsity", "whole", "each"), [(0.5, 30, 10), (0.33, 20, 7), (0.0, 0, 0), (1.0, 60, 20)])
def test_a_sparsity_is_exact_for_the_matrix_or_for_each_row(sparsity: float, whole: int, each: int) -> None:
    torch.manual_seed(1)
    values = torch.randn(3, 20).abs()
    assert int(pruned(values, Amount(sparsity), False).sum()) == whole
    assert pruned(values, Amount(sparsity), True).sum(1).tolist() == [each] * 3


def test_nan_is_refused() -> None:
    with pytest.raises(CalibrationError, match="NaN"):
        pruned(torch.tensor([[1.0, float("nan")]]), Amount(0.5), False)


@pytest.mark.parametrize("count", [0, 1, 40, 77, 126, 127])
def test_shared_counts_are_those_of_one_stable_sort(count: int) -> None:
    torch.manual_seed(2)
    parts = [torch.randn(9, 5), torch.randint(-2, 3, (6, 7)).float() * 1e-3, torch.full((40,), 0.25)]
    parts[0][0, :3] = torch.tensor([-0.0, 0.0, 1e-40])
    order = torch.cat([part.flatten() for part in parts]).sort(stable=True).indices[:count]
    edges = [45, 87, 127]
    expected = [int(((order >= low) & (order < high)).sum()) for low, high in zip([0, *edges], edges, strict=False)]
    assert shared_counts(lambda: iter(parts), count) == expected


def test_least_squares_on_a_mask() -> None:
    torch.manual_seed(3)
    x = torch.randn(60, 16) @ torch.randn(16, 16)
    hessian = x.T @ x / 60
    weight = torch.randn(7, 16)
    kept = torch.rand(7, 16) > 0.5
    kept[0], kept[1] = False, True
    found = refit_kept(weight, weight * kept, kept, hessian, 60)
    assert (found[~kept] == 0).all()
    torch.testing.assert_close(found[1], weight[1])
    wide = hessian.double()
    for row in range(7):
        own = kept[row]
        expected = torch.zeros(16, dtype=torch.float64)
        if own.any():
            expected[own] = torch.linalg.solve(wide[own][:, own], wide[own] @ weight[row].double())
        torch.testing.assert_close(found[row].double(), expected, rtol=2e-3, atol=2e-3)


def test_no_row_gets_worse_whatever_the_hessian() -> None:
    torch.manual_seed(4)
    direction = torch.randn(1, 24)
    hessian = direction.T @ direction + 1e-4 * torch.eye(24)  # as good as singular
    weight = torch.randn(9, 24)
    kept = torch.rand(9, 24) > 0.6
    start = weight * kept

    def losses(values: torch.Tensor) -> torch.Tensor:
        lost = (weight - values).double()
        return (lost @ hessian.double() * lost).sum(1)

    for steps in (0, 1, 3, 50):
        found = refit_kept(weight, start, kept, hessian, steps)
        assert (losses(found) <= losses(start) * (1 + 1e-4) + 1e-6).all()
        assert torch.isfinite(found).all()
        assert torch.equal(found, refit_kept(weight, start, kept, hessian, steps))


@pytest.mark.parametrize(
    ("amount", "match"),
    [
        ({}, "exactly one"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "exactly one"),
        ({"sparsity": 1.5}, "from 0 to 1"),
        ({"sparsity": True}, "from 0 to 1"),
        ({"threshold": float("nan")}, "must be a number"),
        ({"pattern": "4:4"}, "below M"),
        ({"pattern": "0:4"}, "at least 1"),
        ({"pattern": "half"}, "N:M"),
    ],
)
def test_bad_amounts_are_refused(amount: dict[str, object], match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        Amount(**amount)  # type: ignore[arg-type]
