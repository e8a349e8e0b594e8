"""Methods that zero single weights, against slow float64 references."""

from __future__ import annotations

import pytest
import torch
from quantization_cases import case, statistics_of
from torch import Tensor

from hf_shrink.errors import CalibrationError, RecipeError
from hf_shrink.pruning.base import WEIGHTS, Masked, WeightView
from hf_shrink.pruning.importance import register_importance
from hf_shrink.sparsity import Amount

HALF, TWO_FOUR = Amount(sparsity=0.5), Amount(pattern="2:4")


def prune(method: str, weight: Tensor, amount: Amount, x: Tensor | None = None, **options: object) -> Masked:
    view = WeightView(weight.clone(), weight, lambda tensor: tensor, amount)
    statistics = None if x is None else statistics_of(x)
    (found,) = WEIGHTS.build(method, options).prune([view], statistics)
    assert (found.rows[~found.kept] == 0).all()
    return found


def loss(weight: Tensor, found: Masked, x: Tensor) -> float:
    return float((x.double() @ (weight - found.rows).double().T).square().sum())


def optimal_brain_surgeon(weight: Tensor, moment: Tensor, amount: Amount, block_size: int) -> tuple[Tensor, Tensor]:
    """Block by block of columns: choose by w² / [H⁻¹]_jj of the columns still free, then fix one column after another,
    with the free ones moved to their optimum and the inverse reduced. float64, no factor, nothing lazy."""
    rest, columns = weight.double().clone(), weight.shape[1]
    inverse = torch.linalg.inv(moment)
    kept = torch.ones_like(weight, dtype=torch.bool)
    step = amount.numbers[1] if amount.pattern else block_size
    for j in range(columns):
        if j % step == 0:
            stop = min(j + step, columns)
            ahead, costs = inverse.clone(), []
            for k in range(j, stop):  # the cost of column k once those of the block before it are fixed
                costs.append(rest[:, k].square() / ahead[k, k])
                ahead = ahead - torch.outer(ahead[:, k], ahead[k]) / ahead[k, k]
            cost = torch.stack(costs, 1)
            if amount.pattern:
                order = cost.argsort(dim=1, stable=True)[:, : step - amount.numbers[0]]
                kept[:, j:stop] = torch.ones_like(cost, dtype=torch.bool).scatter(1, order, False)
            else:
                count = round(float(amount.sparsity) * cost.numel())
                gone = torch.zeros(cost.numel(), dtype=torch.bool)
                gone[cost.flatten().argsort(dim=0, stable=True)[:count]] = True
                kept[:, j:stop] = ~gone.view_as(cost)
        error = torch.where(kept[:, j], 0.0, rest[:, j])
        rest -= torch.outer(error / inverse[j, j], inverse[j])
        rest[:, j] = torch.where(kept[:, j], rest[:, j], 0.0)
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j, j] = 1.0
    return rest, kept


@pytest.mark.parametrize("amount", [HALF, Amount(sparsity=0.25), TWO_FOUR, Amount(pattern="4:8")], ids=str)
def test_sparsegpt_is_obs_column_by_column(amount: Amount) -> None:
    weight, x = case()
    found = prune("sparsegpt", weight, amount, x, block_size=16)
    moment = statistics_of(x).mean.double()
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(48, dtype=torch.float64)
    rest, kept = optimal_brain_surgeon(weight, damped, amount, 16)
    assert torch.equal(found.kept, kept)
    torch.testing.assert_close(found.rows.double(), rest, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("amount", [HALF, TWO_FOUR], ids=str)
def test_losses_fall_from_magnitude_to_wanda_to_sparsegpt(amount: Amount) -> None:
    totals = dict.fromkeys(("magnitude", "wanda", "sparsegpt"), 0.0)
    for seed in range(4):
        weight, x = case(seed=seed)
        for name in totals:
            totals[name] += loss(weight, prune(name, weight, amount, x), x)
    assert totals["sparsegpt"] < 0.85 * totals["wanda"] < 0.85 * totals["magnitude"]


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "3:6"])
def test_patterns_are_exact(method: str, pattern: str) -> None:
    weight, x = case()
    kept, size = map(int, pattern.split(":"))
    found = prune(method, weight, Amount(pattern=pattern), x)
    assert (found.kept.view(20, -1, size).sum(-1) == kept).all()


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.5, 0.999, 1.0])
def test_a_sparsity_is_met_to_the_weight(method: str, sparsity: float) -> None:
    weight, x = case(out=21, channels=50)
    options = {"block_size": 16} if method == "sparsegpt" else {}
    found = prune(method, weight, Amount(sparsity=sparsity), x, **options)
    assert int((~found.kept).sum()) == int(sparsity * 21 * 50 + 0.5)


def test_wanda_is_weight_times_the_norm_of_its_input_within_rows() -> None:
    weight, x = case()
    found = prune("wanda", weight, HALF, x)
    scores = weight.double().abs() * x.double().norm(dim=0)
    order = scores.argsort(1)
    expected = torch.ones_like(weight, dtype=torch.bool).scatter(1, order[:, :24], False)
    assert torch.equal(found.kept, expected)
    assert torch.equal(found.rows[found.kept], weight[found.kept])
    whole = prune("wanda", weight, HALF, x, granularity="tensor")
    assert int(whole.kept.sum()) == 480 and len(set(whole.kept.sum(1).tolist())) > 1


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_runs_are_deterministic_and_leave_the_weight_alone(method: str) -> None:
    weight, x = case(seed=3)
    before = weight.clone()
    one, two = (prune(method, weight, HALF, x) for _ in range(2))
    assert torch.equal(one.rows, two.rows) and torch.equal(weight, before)


def test_sparsegpt_with_dead_channels_one_token_and_a_constant_row() -> None:
    weight, x = case()
    x[:, [3, 7]] = 0
    found = prune("sparsegpt", weight, HALF, x)
    assert (~found.kept[:, [3, 7]]).float().mean() > 0.9  # what never sees an input goes first
    few = prune("sparsegpt", weight, TWO_FOUR, x[:1])
    assert torch.isfinite(few.rows).all() and int(few.kept.sum()) == weight.numel() // 2
    weight[4] = 0.0
    assert (prune("sparsegpt", weight, HALF, x).rows[4] == 0).all()
    silent = prune("sparsegpt", weight, HALF, x * 0)  # all columns count alike: by magnitude
    assert torch.isfinite(silent.rows).all()


def test_damping_that_had_to_grow_is_noted() -> None:
    weight, x = case()
    statistics = statistics_of(x)
    statistics.hessian -= 0.05 * statistics.hessian.diagonal().mean() * torch.eye(48)
    view = WeightView(weight, weight, lambda tensor: tensor, HALF)
    (found,) = WEIGHTS.build("sparsegpt", {}).prune([view], statistics)
    assert any("damping grew from 0.01 to 0.1" in note for note in found.notes)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_what_needs_data_says_so(method: str) -> None:
    weight, x = case()
    with pytest.raises(CalibrationError, match="calibration data"):
        prune(method, weight, HALF)
    with pytest.raises(CalibrationError, match="calibration data"):
        prune(method, weight, HALF, x[:0])
    x[0, 0] = float("nan")
    with pytest.raises(CalibrationError, match="NaN or Inf"):
        prune(method, weight, HALF, x)


@pytest.mark.parametrize(
    ("method", "options", "match"),
    [
        ("wanda", {"granularity": "global"}, "row, tensor"),
        ("magnitude", {"granularity": "rows"}, "tensor, row, global"),
        ("sparsegpt", {"damping": 0}, "above 0"),
        ("sparsegpt", {"block_size": 0}, "at least 1"),
        ("sparsegpt", {"blocksize": 4}, "did you mean 'block_size'"),
        ("sparsgpt", {}, "did you mean 'sparsegpt'"),
    ],
)
def test_options_are_checked(method: str, options: dict[str, object], match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        WEIGHTS.build(method, options)


def test_an_importance_function_becomes_a_method() -> None:
    weight, x = case()

    @register_importance("largest_first")
    def largest_first(p: Tensor) -> Tensor:
        return -p.abs()

    found = prune("largest_first", weight, HALF, granularity="row")
    assert weight[found.kept].abs().max() < weight[~found.kept].abs().max()
    assert largest_first(torch.ones(1)) == -1
    register_importance("largest_first")(lambda p: p.abs())  # again, as when a notebook's cell runs twice
    assert torch.equal(prune("largest_first", weight, HALF).kept, prune("magnitude", weight, HALF).kept)

    register_importance("wanda_of_mine", needs_statistics=True)(lambda w, moment: w.abs() * moment.diagonal().sqrt())
    mine, theirs = (prune(name, weight, HALF, x, granularity="row") for name in ("wanda_of_mine", "wanda"))
    assert torch.equal(mine.kept, theirs.kept)
    with pytest.raises(RecipeError, match="choose another name"):
        register_importance("wanda")(largest_first)


@pytest.mark.parametrize(
    ("function", "error", "match"),
    [
        (lambda p: p.abs().sum(), RecipeError, "of shape"),
        (lambda p: 1.0, RecipeError, "gave float"),
        (lambda p: p * float("nan"), CalibrationError, "NaN"),
    ],
)
def test_what_a_function_gives_is_checked(function: object, error: type[Exception], match: str) -> None:
    register_importance("faulty")(function)  # type: ignore[arg-type]
    with pytest.raises(error, match=match):
        prune("faulty", torch.randn(4, 8), HALF)
