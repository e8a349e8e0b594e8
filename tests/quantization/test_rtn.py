"""Round to nearest."""

from __future__ import annotations

import pytest
import torch
from quantization_cases import SCHEMES, case, statistics_of

from hf_shrink.errors import CalibrationError, RecipeError
from hf_shrink.ops.grid import min_max_grid, search_grid
from hf_shrink.plan import Scheme
from hf_shrink.quantization import METHODS


def test_methods_are_found_by_name():
    assert {"rtn", "gptq"} <= set(METHODS.names())
    assert METHODS.build("rtn", {"search": False}).search is False
    with pytest.raises(RecipeError, match="did you mean 'gptq'"):
        METHODS.get("gtpq")
    with pytest.raises(RecipeError, match="no option 'serch'; did you mean 'search'"):
        METHODS.build("rtn", {"serch": True})


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_uses_the_grid_it_says(scheme):
    weight, x = case()
    rtn, plain = METHODS.build("rtn", {}), METHODS.build("rtn", {"search": False})
    assert not rtn.needs_statistics
    result = plain.solve(weight, scheme, None, scale_dtype=torch.bfloat16)
    assert torch.equal(result.grid.scale, min_max_grid(weight, scheme, torch.bfloat16).scale)
    searched = rtn.solve(weight, scheme, statistics_of(x), scale_dtype=torch.bfloat16)
    diagonal = statistics_of(x).mean.diagonal()
    assert torch.equal(searched.grid.scale, search_grid(weight, scheme, diagonal, torch.bfloat16).scale)
    assert searched.values.dtype == torch.int8 and searched.dequantized().dtype == torch.float32


def test_error_is_that_of_the_outputs_or_of_the_weights():
    weight, x = case()
    scheme = Scheme(3, True, "group", 16)
    rtn = METHODS.build("rtn", {})
    result = rtn.solve(weight, scheme, statistics_of(x), scale_dtype=torch.float32)
    lost = (x.double() @ (weight - result.dequantized()).double().T).square().sum()
    assert result.error == pytest.approx((lost / (x.double() @ weight.double().T).square().sum()).item(), rel=1e-4)
    free = rtn.solve(weight, scheme, None, scale_dtype=torch.float32)
    lost = (weight - free.dequantized()).square().sum() / weight.square().sum()
    assert free.error == pytest.approx(lost.item(), rel=1e-4)
    assert (
        0
        < free.error
        < METHODS.build("rtn", {"search": False}).solve(weight, scheme, None, scale_dtype=torch.float32).error
    )


def test_rows_slice_a_stacked_weight():
    weight, _ = case()
    rtn = METHODS.build("rtn", {})
    for scheme in SCHEMES:
        whole = rtn.solve(weight, scheme, None, scale_dtype=torch.float16)
        assert torch.equal(whole.rows(5, 12).dequantized(), whole.dequantized()[5:12])
        if scheme.strategy != "tensor":
            part = rtn.solve(weight[5:12], scheme, None, scale_dtype=torch.float16)
            assert torch.equal(part.values, whole.rows(5, 12).values)
            assert torch.equal(part.grid.scale, whole.rows(5, 12).grid.scale)


def test_bad_numbers_are_named():
    weight, x = case()
    rtn = METHODS.build("rtn", {})
    statistics = statistics_of(x)
    statistics.hessian[3, 4] = float("nan")
    with pytest.raises(CalibrationError, match="inputs hold NaN"):
        rtn.solve(weight, SCHEMES[0], statistics, scale_dtype=torch.float32)
    weight[0, 0] = float("nan")
    with pytest.raises(CalibrationError, match="weight holds NaN"):
        rtn.solve(weight, SCHEMES[0], None, scale_dtype=torch.float32)


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.bits < 8], ids=str)
def test_cubes_are_what_the_search_without_data_makes_small(scheme):
    weight, _ = case()
    weight = weight * torch.where(torch.rand(weight.shape) < 0.03, 4.0, 1.0)  # outliers, on which the two differ
    cubed, squared = (
        METHODS.build("rtn", {"power": power}).solve(weight, scheme, None, scale_dtype=torch.float32)
        for power in (3, 2)
    )
    assert METHODS.build("rtn", {}).power == 3

    def errors(result, power):
        error = (weight.double() - result.dequantized().double()).abs() ** power
        return error.reshape(result.grid.scale.numel(), -1).sum(1)

    assert (errors(cubed, 3) <= errors(squared, 3) * (1 + 1e-5)).all()
    assert (errors(squared, 2) <= errors(cubed, 2) * (1 + 1e-5)).all()
    if scheme.strategy != "tensor":
        assert errors(cubed, 3).sum() < 0.99 * errors(squared, 3).sum()
    with pytest.raises(RecipeError, match="power must be 2 or 3"):
        METHODS.build("rtn", {"power": 2.5})
