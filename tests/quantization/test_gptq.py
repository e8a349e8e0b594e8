"""GPTQ against a literal float64 loop, and its promises: better than RTN, rows independent, degenerate inputs."""

from __future__ import annotations

import pytest
import torch
from quantization_cases import SCHEMES, case, statistics_of

from hf_shrink.calibration.statistics import InputStatistics
from hf_shrink.errors import CalibrationError, RecipeError
from hf_shrink.ops.grid import Grid, integer_range, search_grid
from hf_shrink.ops.linalg import relative_error
from hf_shrink.plan import Scheme
from hf_shrink.quantization import METHODS
from hf_shrink.quantization.gptq import GPTQ
from hf_shrink.quantization.rtn import RTN


def solve(method, weight, scheme, x, scale_dtype=torch.float32):
    return method.solve(weight, scheme, statistics_of(x), scale_dtype=scale_dtype)


def optimal_brain_quantization(weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, order: list[int]):
    """Round the columns in `order`; after each, move the others to their optimum and eliminate it. float64."""
    low, high = integer_range(grid.scheme.bits)
    size = grid.scheme.group_size or weight.shape[1]
    remaining = weight.double().clone()
    inverse = torch.linalg.inv(hessian)
    values = torch.empty(weight.shape, dtype=torch.int8)
    for j in order:
        scale = grid.scale[:, j // size].double()
        zero = 0 if grid.zero_point is None else grid.zero_point[:, j // size].double()
        q = (torch.round(remaining[:, j] / scale) + zero).clamp(low, high)
        values[:, j] = q.to(torch.int8)
        error = remaining[:, j] - (q - zero) * scale
        remaining -= torch.outer(error / inverse[j, j], inverse[j])
        inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j, j] = 1.0  # eliminated: its row and column are zero now, and it is never used again
    return values


def rounding_order(diagonal: torch.Tensor, group_size: int | None, rescale: bool) -> list[int]:
    """Columns by falling second moment; group by group, by its mean, where scales are chosen on the way."""
    columns = diagonal.argsort(descending=True).tolist()
    if not rescale or group_size is None:
        return columns
    means = {g: float(diagonal[g * group_size : (g + 1) * group_size].mean()) for g in range(48 // group_size)}
    groups = sorted(means, key=means.get, reverse=True)
    return [j for g in groups for j in columns if j // group_size == g]


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_same_integers_as_a_literal_loop(scheme, act_order, rescale):
    weight, x = case()
    method = GPTQ(act_order=act_order, rescale=rescale, block_size=20, refinements=0)
    result = solve(method, weight, scheme, x)
    hessian = statistics_of(x).mean.double()
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(48)
    order = rounding_order(hessian.diagonal(), scheme.group_size, rescale) if act_order else list(range(48))
    expected = optimal_brain_quantization(weight, damped, result.grid, order)
    if not torch.equal(result.values, expected):  # a tie in float32: then the error must be the same
        ours = relative_error(weight, result.dequantized(), hessian.float())
        other = type(result)(expected, result.grid, 0.0).dequantized()
        assert ours == pytest.approx(relative_error(weight, other, hessian.float()), rel=1e-6)


def test_scales_chosen_on_the_way_are_the_best_for_the_compensated_weights():
    scheme = Scheme(3, True, "group", 16)
    weight, x = case()
    hessian = statistics_of(x).mean.double()
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(48)
    grid = solve(GPTQ(refinements=0), weight, scheme, x).grid
    order = rounding_order(hessian.diagonal(), 16, True)
    group = order[-1] // 16  # the last one: all others have been rounded before
    last = [j for j in range(48) if j // 16 == group]
    earlier = order[:32]
    rounded = solve(GPTQ(refinements=0), weight, scheme, x).dequantized()[:, earlier].double()
    inside = damped[last][:, last]
    moved = (weight[:, earlier].double() - rounded) @ damped[earlier][:, last] @ torch.linalg.inv(inside)
    compensated = (weight[:, last] + moved).float()  # the least-squares answer to all errors so far
    expected = search_grid(
        compensated, Scheme(3, True, "channel", None), damped.diagonal()[last].float(), torch.float32
    )
    torch.testing.assert_close(grid.scale[:, group], expected.scale[:, 0], rtol=1e-4, atol=0)


def test_choosing_scales_on_the_way_lowers_the_error():
    total = {True: 0.0, False: 0.0}
    for seed in range(6):
        weight, x = case(seed=seed)
        for rescale in total:
            total[rescale] += solve(GPTQ(rescale=rescale), weight, Scheme(2, False, "group", 16), x).error
    assert total[True] < total[False]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_error_falls_from_rtn_to_gptq_to_refined(scheme):
    weight, x = case(seed=1)
    methods = [RTN(search=False), RTN(), GPTQ(refinements=0), GPTQ(refinements=1), GPTQ(refinements=3)]
    plain, rtn, gptq, once, thrice = (solve(method, weight, scheme, x).error for method in methods)
    assert rtn < plain or scheme.bits == 8  # with 8 bits there is next to nothing to clip
    assert gptq < 0.8 * rtn
    assert thrice <= once < gptq


def test_error_is_that_of_the_outputs():
    weight, x = case()
    result = solve(GPTQ(), weight, SCHEMES[0], x)
    lost = (x.double() @ (weight - result.dequantized()).double().T).square().sum()
    assert result.error == pytest.approx((lost / (x.double() @ weight.double().T).square().sum()).item(), rel=1e-4)


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.strategy != "tensor"], ids=str)
def test_stacked_rows_are_solved_as_if_apart(scheme):
    weight, x = case(out=61, channels=96, tokens=700)
    whole = solve(GPTQ(refinements=2), weight, scheme, x, torch.bfloat16)
    for start, stop in ((0, 24), (24, 25), (25, 61)):
        part = solve(GPTQ(refinements=2), weight[start:stop], scheme, x, torch.bfloat16)
        rows = whole.rows(start, stop)
        assert torch.equal(part.values, rows.values)
        assert torch.equal(part.grid.scale, rows.grid.scale)
        assert scheme.symmetric or torch.equal(part.grid.zero_point, rows.grid.zero_point)


def test_block_size_changes_nothing_and_runs_are_deterministic():
    weight, x = case()
    results = [solve(GPTQ(block_size=size), weight, SCHEMES[0], x) for size in (1, 7, 64, 64)]
    assert torch.equal(results[2].values, results[3].values)
    assert torch.equal(results[2].grid.scale, results[3].grid.scale)
    for result in results[:2]:
        assert result.error == pytest.approx(results[2].error, rel=1e-2)
        assert (result.values == results[2].values).float().mean() > 0.98


def test_the_input_is_left_alone():
    weight, x = case()
    weight.requires_grad_()  # as a model's own parameter
    statistics = statistics_of(x)
    before = weight.clone(), statistics.hessian.clone()
    GPTQ().solve(weight, SCHEMES[0], statistics, scale_dtype=torch.float32)
    assert torch.equal(weight, before[0]) and torch.equal(statistics.hessian, before[1])


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_dead_channels_are_rounded_to_nearest_and_noted(scheme):
    weight, x = case()
    x[:, [2, 30]] = 0
    result = solve(GPTQ(), weight, scheme, x)
    assert any("2 of 48 input channels were always zero" in note for note in result.notes)
    size = scheme.group_size or 48
    for j in (2, 30):
        scale = result.grid.scale[:, j // size].abs()
        inside = (result.dequantized()[:, j] - weight[:, j]).abs() <= scale * 0.5001
        clipped = (result.values[:, j] == integer_range(scheme.bits)[0]) | (
            result.values[:, j] == integer_range(scheme.bits)[1]
        )
        assert (inside | clipped).all()


@pytest.mark.parametrize("tokens", [1, 5])
def test_few_tokens(tokens):
    weight, x = case(tokens=tokens)
    result = solve(GPTQ(), weight, SCHEMES[0], x)
    assert 0 <= result.error < solve(RTN(), weight, SCHEMES[0], x).error
    # Damping keeps the weights near the dense ones where the statistics say nothing.
    assert relative_error(weight, result.dequantized(), None) < 0.1


def test_inputs_that_were_all_zero():
    weight, x = case()
    result = solve(GPTQ(), weight, SCHEMES[0], x * 0)
    assert result.error == 0.0 and any("48 of 48" in note for note in result.notes)
    nearest = RTN(power=2).solve(weight, SCHEMES[0], None, scale_dtype=torch.float32)
    assert relative_error(weight, result.dequantized(), None) <= nearest.error  # every channel counted alike
    unrefined = solve(GPTQ(refinements=0), weight, SCHEMES[0], x * 0)
    assert torch.equal(unrefined.values, nearest.values)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_constant_rows_and_half_precision(scheme, dtype):
    weight, x = case()
    weight[3], weight[4], weight[5] = 0.0, 2.5, -1e-6
    result = solve(GPTQ(), weight.to(dtype).float(), scheme, x, dtype)
    assert result.grid.scale.dtype == dtype
    assert torch.isfinite(result.grid.scale).all() and (result.grid.scale != 0).all()
    assert torch.isfinite(result.dequantized()).all()
    assert (result.dequantized()[3] == 0).all() or scheme.strategy == "tensor"
    assert result.error < 0.2


def test_a_group_larger_than_the_row():
    weight, x = case()
    result = solve(GPTQ(), weight, Scheme(4, True, "group", 128), x)
    assert result.grid.scheme.group_size == 48
    assert torch.equal(result.values, solve(GPTQ(), weight, Scheme(4, True, "channel", None), x).values)


def test_damping_that_had_to_grow_is_noted():
    weight, x = case()
    statistics = statistics_of(x)
    statistics.hessian -= 0.05 * statistics.hessian.diagonal().mean() * torch.eye(48)  # as if summed with too few bits
    result = GPTQ().solve(weight, SCHEMES[0], statistics, scale_dtype=torch.float32)
    assert any("damping grew from 0.01 to 0.1" in note for note in result.notes)
    assert torch.isfinite(result.dequantized()).all() and result.error < 0.05


def test_bad_numbers_are_named():
    weight, x = case()
    with pytest.raises(CalibrationError, match="has seen no inputs"):
        GPTQ().solve(weight, SCHEMES[0], None, scale_dtype=torch.float32)
    with pytest.raises(CalibrationError, match="has seen no inputs"):
        GPTQ().solve(weight, SCHEMES[0], InputStatistics.empty(48), scale_dtype=torch.float32)
    x[5, 7] = float("inf")
    with pytest.raises(CalibrationError, match="inputs hold NaN or Inf"):
        solve(GPTQ(), weight, SCHEMES[0], x)
    weight[1, 1] = float("nan")
    with pytest.raises(CalibrationError, match="weight holds NaN or Inf"):
        solve(GPTQ(), weight, SCHEMES[0], case()[1])


@pytest.mark.parametrize("options", [{"damping": 0}, {"damping": -1.0}, {"block_size": 0}, {"refinements": -1}])
def test_options_are_checked(options):
    (name,) = options
    with pytest.raises(RecipeError, match=name):
        METHODS.build("gptq", options)


def test_beats_rtn_on_a_real_layer(minilm_dir):
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm_dir)
    model = AutoModel.from_pretrained(minilm_dir, dtype=torch.float32).eval()
    texts = ["A child walks along the ridges of sand, counting.", "The court adjourned without a verdict on Friday."]
    linear = model.encoder.layer[2].intermediate.dense
    seen = []
    handle = linear.register_forward_hook(lambda module, args, output: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(**tokenizer(texts * 4, padding=True, return_tensors="pt"))
    handle.remove()
    weight, scheme = linear.weight.detach(), Scheme(4, True, "group", 64)
    rtn, gptq = (solve(method, weight, scheme, torch.cat(seen)) for method in (RTN(), GPTQ()))
    assert gptq.error < 0.5 * rtn.error
