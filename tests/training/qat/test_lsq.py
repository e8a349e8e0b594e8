"""LSQ's forward pass and gradients against a slow reference in float64, one weight after the other."""

from __future__ import annotations

import math

import pytest
import torch
from quantization_cases import SCHEMES
from torch import Tensor

from hf_shrink.ops.grid import dequantize, quantize, search_grid
from hf_shrink.ops.quantized import QuantizedWeight
from hf_shrink.plan import Scheme
from hf_shrink.runtime.int8 import quantize_tokens
from hf_shrink.runtime.linear import CompressedLinear
from hf_shrink.training.qat.int8 import rounded_linear
from hf_shrink.training.qat.lsq import fake_quantize, gradient_scale, idle

ROWS, COLUMNS = 5, 32


def reference(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: Scheme, upstream: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The weight as stored, and the gradients of sum(upstream * it) by weight and scale, as the article has them."""
    lowest, highest = -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1
    fake, to_weight = torch.zeros(ROWS, COLUMNS).double(), torch.zeros(ROWS, COLUMNS).double()
    to_scale = torch.zeros(scale.shape).double()
    sharing = {"tensor": ROWS * COLUMNS, "channel": COLUMNS, "group": scheme.group_size}[scheme.strategy]
    levels = highest if scheme.symmetric else highest - lowest
    for i in range(ROWS):
        for j in range(COLUMNS):
            place = (0 if scheme.strategy == "tensor" else i, j // scheme.group_size if scheme.group_size else 0)
            s, z = float(scale[place]), 0 if zero_point is None else int(zero_point[place])
            v = float(weight[i, j]) / s + z
            q = min(max(round(v), lowest), highest)
            fake[i, j] = (q - z) * s
            inside = lowest <= v <= highest
            to_weight[i, j] = float(upstream[i, j]) if inside else 0.0
            slope = q - v if inside else q - z
            to_scale[place] += float(upstream[i, j]) * slope / math.sqrt(sharing * levels)
    return fake, to_weight, to_scale


@pytest.mark.parametrize("scheme", [*SCHEMES, Scheme(8, True, "channel", None, "int", 8)])
def test_forward_and_gradients_are_the_articles(scheme: Scheme) -> None:
    weight, upstream = torch.randn(ROWS, COLUMNS), torch.randn(ROWS, COLUMNS)
    grid = search_grid(weight, scheme, None, torch.float32)
    scale = grid.scale * 0.7  # so that some weights are out of range on either side
    weight[0, 0], weight[1, 3] = 30.0, -30.0
    unit = scale * (0.5 + torch.rand_like(scale))
    step = (scale / unit).requires_grad_()
    trained = weight.clone().requires_grad_()
    found = fake_quantize(trained, step, unit, grid.zero_point, scheme, torch.float32)
    (found * upstream).sum().backward()
    fake, to_weight, to_scale = reference(weight, (unit * step).detach(), grid.zero_point, scheme, upstream)
    assert 0 < int((to_weight == 0).sum()) < weight.numel()
    torch.testing.assert_close(found.detach().double(), fake, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(trained.grad.double(), to_weight, atol=0, rtol=1e-6)
    torch.testing.assert_close(step.grad.double() * unit.double(), to_scale, atol=1e-5, rtol=1e-5)


def test_scales_with_a_negative_sign_have_the_extra_integer_above_zero() -> None:
    scheme = Scheme(4, True, "channel", None)
    weight = torch.linspace(-7.4, 8.4, COLUMNS).repeat(ROWS, 1)
    unit, step = torch.full((ROWS, 1), -0.5), torch.full((ROWS, 1), 2.0)
    found = fake_quantize(weight, step, unit, None, scheme, torch.float32)
    assert found.max() == 8 and found.min() == -7


def test_plain_gradient_descent_moves_the_scale_as_if_there_were_no_units() -> None:
    scheme, weight, upstream = Scheme(3, True, "group", 16), torch.randn(ROWS, COLUMNS), torch.randn(ROWS, COLUMNS)
    scale = search_grid(weight, scheme, None, torch.float32).scale
    moved = []
    for unit in (torch.ones_like(scale), scale / 3):
        step = (scale / unit).requires_grad_()
        (fake_quantize(weight, step, unit, None, scheme, torch.float32) * upstream).sum().backward()
        moved.append(unit * (step - 0.01 * step.grad).detach())
    torch.testing.assert_close(moved[0], moved[1])
    assert not torch.allclose(moved[0], scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_forward_pass_gives_what_is_stored_bit_for_bit(dtype: torch.dtype) -> None:
    scheme = Scheme(4, False, "group", 16)
    weight = torch.randn(ROWS, COLUMNS).to(dtype)
    grid = search_grid(weight, scheme, None, dtype)
    found = fake_quantize(weight, torch.ones(grid.scale.shape), grid.scale.float(), grid.zero_point, scheme, dtype)
    assert found.dtype == dtype
    assert torch.equal(found, dequantize(quantize(weight, grid), grid).to(dtype))


def test_the_gradient_scale_is_the_articles() -> None:
    assert gradient_scale(Scheme(4, True, "group", 16), 5, 32) == 1 / math.sqrt(16 * 7)
    assert gradient_scale(Scheme(2, True, "channel", None), 5, 32) == 1 / math.sqrt(32 * 1)
    assert gradient_scale(Scheme(2, False, "tensor", None), 5, 32) == 1 / math.sqrt(160 * 3)


def test_an_idle_weight_is_itself_and_gives_its_step_a_gradient_of_zero() -> None:
    weight, step = torch.randn(3, 4, requires_grad=True), torch.ones(3, 1, requires_grad=True)
    found = idle(weight, step)
    assert torch.equal(found, weight)
    found.square().sum().backward()
    assert torch.equal(weight.grad, 2 * weight) and torch.equal(step.grad, torch.zeros(3, 1))


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_product_of_w8a8_is_the_packed_modules_and_its_gradients_those_of_rounded_factors(symmetric: bool) -> None:
    scheme = Scheme(8, True, "channel", None, "int", 8, symmetric)
    x, bias = torch.randn(2, 3, COLUMNS, requires_grad=True), torch.randn(ROWS, requires_grad=True)
    weight, upstream = torch.randn(ROWS, COLUMNS), torch.randn(2, 3, ROWS)
    grid = search_grid(weight, scheme, None, torch.float32)
    stored = QuantizedWeight(quantize(weight, grid), grid, 0.0)
    fake = stored.dequantized().requires_grad_()
    found = rounded_linear(x, fake, bias, stored)
    assert torch.equal(found, CompressedLinear.from_quantized(stored, bias)(x))
    (found * upstream).sum().backward()
    rounded = quantize_tokens(x, symmetric).rounded().double()
    assert not torch.equal(rounded, x.detach().double())
    torch.testing.assert_close(x.grad.double(), upstream.double() @ fake.detach().double(), rtol=1e-5, atol=1e-5)
    expected = torch.einsum("abo,abi->oi", upstream.double(), rounded)
    torch.testing.assert_close(fake.grad.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bias.grad, upstream.sum((0, 1)))
    for leaf in (x, fake, bias):
        leaf.grad = None
    alone = x[0, 0].detach().clone().requires_grad_()  # a single vector
    (rounded_linear(alone, fake, bias, stored) * upstream[0, 0]).sum().backward()
    assert alone.grad.shape == alone.shape and fake.grad.shape == fake.shape
    torch.testing.assert_close(bias.grad, upstream[0, 0])
