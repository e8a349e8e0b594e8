"""What `awq` and `smooth` promise, on weights and inputs with planted outliers, against slow float64 references."""

from __future__ import annotations

import pytest
import torch
from quantization_cases import case as correlated
from torch import Tensor

from hf_shrink.calibration.statistics import InputStatistics
from hf_shrink.errors import CalibrationError, RecipeError
from hf_shrink.ops.grid import dequantize, quantize, search_grid
from hf_shrink.plan import Scheme
from hf_shrink.quantization import METHODS
from hf_shrink.transforms import TRANSFORMS, Scaling, ScalingCase, build_transforms

W3 = Scheme(3, True, "group", 16)


def collected(x: Tensor) -> InputStatistics:
    statistics = InputStatistics.empty(x.shape[1])
    for part in x.split(100):
        statistics.add(part)
    return statistics.finish("the input")


def planted(seed: int = 0, outliers: int = 3, size: float = 30.0) -> tuple[list[Tensor], Tensor]:
    """Two weights (20, 48) and (12, 48), and inputs (400, 48) of which some channels are much larger."""
    weight, x = correlated(out=32, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    x = x / x.square().mean(0).sqrt()
    x[:, torch.randperm(48, generator=generator)[:outliers]] *= size
    return [weight[:20].contiguous(), weight[20:].contiguous()], x


def make_case(weights: list[Tensor], x: Tensor, scheme: Scheme | None = W3, **changes: object) -> ScalingCase:
    settings: dict[str, object] = {"unit": torch.arange(x.shape[1]), **changes}
    return ScalingCase(weights, [scheme] * len(weights), collected(x), **settings)  # type: ignore[arg-type]


def scaling(name: str, **options: object) -> Scaling:
    (built,) = build_transforms([{name: options}])
    assert isinstance(built, Scaling)
    return built


def reference_error(weights: list[Tensor], x: Tensor, scale: Tensor, scheme: Scheme, weighted: bool) -> float:
    """Mean squared output error a token, from outputs in float64."""
    total = 0.0
    for weight in weights:
        importance = x.square().mean(0) / scale.square() if weighted else None
        grid = search_grid(weight * scale, scheme, importance, torch.float32)
        rounded = dequantize(quantize(weight * scale, grid), grid)
        error = (x / scale).double() @ rounded.double().T - x.double() @ weight.double().T
        total += float(error.square().sum()) / len(x)
    return total


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("scheme", [W3, Scheme(2, False, "group", 16), Scheme(4, True, "channel", None)])
def test_the_error_is_that_of_the_outputs(weighted: bool, scheme: Scheme) -> None:
    weights, x = planted()
    scale = torch.linspace(0.3, 3, 48)
    found = make_case(weights, x, scheme, weighted=weighted).error(scale)
    assert found == pytest.approx(reference_error(weights, x, scale, scheme, weighted), rel=1e-3)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_awq_finds_the_best_alpha_and_outliers_cost_less(weighted: bool, bits: int) -> None:
    weights, x = planted()
    scheme = Scheme(bits, True, "group", 16)
    scale = scaling("awq").scales(make_case(weights, x, scheme, weighted=weighted))
    found = reference_error(weights, x, scale, scheme, weighted)
    rms = x.double().square().mean(0).sqrt().float()
    tried = []
    for step in range(11):
        candidate = rms.pow(step / 10)
        candidate = candidate / (candidate.max() * candidate.min()).sqrt()
        tried.append(reference_error(weights, x, candidate, scheme, weighted))
    assert found < min(0.75 * tried[0], 1.2 * min(tried))
    assert float(scale.max() * scale.min()) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_awq_is_never_worse_than_no_scales(seed: int) -> None:
    weights, x = planted(seed, outliers=0)
    case = make_case(weights, x)
    scale = scaling("awq", rows=4).scales(case)
    assert case.error(scale) <= case.error(torch.ones(48))


def test_awq_helps_gptq_too_on_outliers() -> None:
    weights, x = planted()
    scale = scaling("awq").scales(make_case(weights, x))
    errors = []
    for s in (torch.ones(48), scale):
        solved = METHODS.build("gptq", {}).solve(weights[0] * s, W3, collected(x / s), scale_dtype=torch.float32)
        difference = (solved.dequantized() / s - weights[0]).double()
        errors.append(float((x.double() @ difference.T).square().sum()))
    assert errors[1] < 1.05 * errors[0]


def test_dense_weights_do_not_count() -> None:
    weights, x = planted()
    both = ScalingCase(weights, [W3, None], collected(x), torch.arange(48))
    assert torch.equal(scaling("awq").scales(both), scaling("awq").scales(make_case(weights[:1], x)))


@pytest.mark.parametrize("name", ["awq", "smooth"])
def test_units_share_a_scale(name: str) -> None:
    weights, x = planted()
    unit = torch.arange(24).repeat(2)
    scale = scaling(name).scales(make_case(weights, x, unit=unit))
    assert scale.shape == (24,)
    assert (scale > 0).all()
    assert not torch.equal(scale, torch.ones(24))


@pytest.mark.parametrize("name", ["awq", "smooth"])
@pytest.mark.parametrize(
    "kind", ["dead channel", "all dead", "one token", "constant rows", "zero weights", "wide group"]
)
def test_degenerate_inputs_give_finite_scales(name: str, kind: str) -> None:
    weights, x = planted()
    if kind == "dead channel":
        x[:, 5] = 0
    elif kind == "all dead":
        x.zero_()
    elif kind == "one token":
        x = x[:1]
    elif kind == "constant rows":
        weights[0][:] = 0.5
    elif kind == "zero weights":
        weights = [torch.zeros_like(w) for w in weights]
    scheme = Scheme(3, True, "group", 128) if kind == "wide group" else W3
    case = make_case(weights, x, scheme)
    scale = scaling(name).scales(case)
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    assert torch.equal(scale, scaling(name).scales(case))
    if kind in ("dead channel", "all dead"):
        assert name == "awq" or scale[5] == 1
    if kind == "all dead":
        assert torch.equal(scale, torch.ones(48))


def fake_w8a8(weight: Tensor, x: Tensor) -> Tensor:
    """Outputs, float64, with int8 weights a row and int8 activations a token."""
    step = weight.abs().amax(1, keepdim=True) / 127
    token = x.abs().amax(1, keepdim=True) / 127
    return ((x / token).round() * token).double() @ ((weight / step).round() * step).double().T


@pytest.mark.parametrize("seed", range(3))
def test_smooth_makes_w8a8_better_on_outliers(seed: int) -> None:
    weights, x = planted(seed, size=100.0)
    scale = scaling("smooth").scales(make_case(weights, x, Scheme(8, True, "channel", None)))
    weight = torch.cat(weights)
    exact = x.double() @ weight.double().T
    plain = (fake_w8a8(weight, x) - exact).square().sum()
    smoothed = (fake_w8a8(weight * scale, x / scale) - exact).square().sum()
    assert smoothed < 0.5 * plain


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_smooth_is_its_formula(alpha: float) -> None:
    weights, x = planted()
    largest_x, largest_w = x.double().abs().amax(0), torch.cat(weights).double().abs().amax(0)
    expected = largest_x**alpha / largest_w ** (1 - alpha)
    found = scaling("smooth", alpha=alpha).scales(make_case(weights, x))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def test_smooth_without_maxima_says_so() -> None:
    weights, x = planted()
    statistics = InputStatistics(x.T @ x, len(x))
    with pytest.raises(CalibrationError, match="largest"):
        scaling("smooth").scales(ScalingCase(weights, [W3, W3], statistics, torch.arange(48)))


def test_names_and_options() -> None:
    assert TRANSFORMS.names() == ["awq", "rotate", "shift", "smooth"]
    for specs, message in (
        (["awk"], "did you mean 'awq'"),
        ([{"smooth": {"alpa": 1}}], "did you mean 'alpha'"),
        ([{"smooth": {"alpha": 2}}], "between 0 and 1"),
        ([{"awq": {"grid": 0}}], "at least 1"),
        (["awq", "awq"], "twice"),
        (["awq", "rotate"], r"\[rotate, awq\]"),
        ([{"awq": 3}], "names? with options|a name"),
        ([["awq"]], "a name"),
    ):
        with pytest.raises(RecipeError, match=message):
            build_transforms(specs)  # type: ignore[arg-type]
