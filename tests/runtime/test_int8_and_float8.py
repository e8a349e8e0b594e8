"""W8A8 and FP8A16 modules: compressed-tensors' own forward, float64, gradients, casts, state."""

from __future__ import annotations

import copy

import pytest
import torch
from compressed_tensors.compressors.base import decompress_module
from compressed_tensors.quantization import QuantizationStatus
from compressed_tensors.quantization.lifecycle.initialize import initialize_module_for_quantization
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from torch import nn

from hf_shrink.checkpoint.packed import group_of, scheme_of
from hf_shrink.errors import RecipeError
from hf_shrink.plan import Scheme
from hf_shrink.quantization.rtn import RTN
from hf_shrink.runtime import CompressedEmbedding, CompressedLinear, count_parameters, int8
from hf_shrink.runtime.trainable import TrainableLinear

FP8 = Scheme(8, True, "channel", None, "float")
W8A8 = Scheme(8, True, "channel", None, "int", 8)
PLAIN = Scheme(8, True, "channel", None, "int", 8, activation_symmetric=True)
every = pytest.mark.parametrize("scheme", [FP8, W8A8, PLAIN], ids=["fp8", "w8a8", "w8a8 symmetric"])
both = pytest.mark.parametrize("scheme", [FP8, W8A8], ids=["fp8", "w8a8"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def compressed(scheme: Scheme, dtype=torch.float32, bias=True, out=20, columns=48) -> CompressedLinear:
    result = RTN().solve(torch.randn(out, columns) + 0.2, scheme, None, scale_dtype=dtype)
    return CompressedLinear.from_quantized(result, nn.Parameter(torch.randn(out, dtype=dtype)) if bias else None)


def stock_twin(linear: CompressedLinear) -> nn.Linear:
    """compressed-tensors' own module from our checkpoint tensors, as it is after the first forward of a model."""
    twin = nn.Linear(linear.in_features, linear.out_features, dtype=linear.weight_dtype)
    group = group_of(linear.scheme, ["Linear"])
    initialize_module_for_quantization(twin, group, force_zero_point=False)
    twin.quantization_status = QuantizationStatus.COMPRESSED
    twin.weight = nn.Parameter(linear.weight_packed.clone(), requires_grad=False)
    twin.weight_scale = nn.Parameter(linear.weight_scale.clone(), requires_grad=False)
    twin.bias = nn.Parameter(linear.bias.detach().clone())
    decompress_module(twin)
    return twin


@every
@dtypes
def test_the_numbers_are_those_of_compressed_tensors(scheme, dtype):
    linear = compressed(scheme, dtype)
    twin = stock_twin(linear)
    assert torch.equal(twin.weight, linear.weight)
    x = torch.randn(2, 7, 48, dtype=dtype) * torch.logspace(-3, 1, 7)[:, None].to(dtype)
    x[0, 3] = 0
    x[1, :4] = x[1, :4].abs() + 0.5  # on one side, of either sign
    x[1, 4:] = -x[1, 4:].abs() - 0.5
    with torch.no_grad():
        found, expected = linear(x), twin(x)
    assert found.dtype == dtype
    close = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    assert (found - expected).abs().max() <= close * expected.abs().max()
    dense = nn.functional.linear(x, linear.weight, linear.bias)
    assert torch.equal(found, dense) == (scheme is FP8)  # inputs are rounded, or not


@dtypes
@pytest.mark.parametrize("symmetric", [True, False])
def test_tokens_are_rounded_as_a_float64_reference_does(dtype, symmetric):
    x = (torch.randn(3, 5, 64) * 4).to(dtype)
    x[1, 3], x[2, 0], x[2, 1] = 0, x[2, 0].abs() + 1, -x[2, 1].abs() - 1
    values, scale, zero_point = tokens = int8.quantize_tokens(x, symmetric)
    assert values.dtype == torch.int8 and scale.dtype == dtype and scale.shape == (3, 5, 1)
    eps = float(torch.finfo(dtype).eps)
    lowest, highest = x.double().amin(-1, keepdim=True).clamp(max=0), x.double().amax(-1, keepdim=True).clamp(min=0)
    steps = torch.maximum(-lowest, highest) / 127.5 if symmetric else (highest - lowest) / 255
    torch.testing.assert_close(scale.double(), steps.where(steps > 0, eps), rtol=2 * eps, atol=0)
    # Half a step, one step at the end that is cut, and what the quotient is rounded by in half precision.
    zero = 0 if zero_point is None else zero_point.double()
    room = 0.5 + 256 * eps + (0 if symmetric else 0.5)
    assert (((values.double() - zero) * scale.double() - x.double()).abs() <= room * scale.double() * 1.01).all()
    assert (tokens.rounded()[1, 3] == 0).all() and (zero_point is None) == symmetric
    alone = int8.quantize_tokens(x[1, 2], symmetric)
    assert torch.equal(alone.values, values[1, 2]) and torch.equal(alone.scale, scale[1, 2])


def test_zero_points_halve_the_error_of_inputs_on_one_side():
    x = torch.nn.functional.gelu(torch.randn(40, 256) * 3)
    plain, with_zero = ((int8.quantize_tokens(x, s).rounded() - x).norm() for s in (True, False))
    assert with_zero < 0.6 * plain


def test_the_product_is_exact_in_every_way_it_is_computed(monkeypatch):
    values = torch.randint(-128, 128, (9, 200), dtype=torch.int8)
    weight = torch.randint(-128, 128, (17, 200), dtype=torch.int8)
    values[0], weight[0], weight[1] = -128, -128, 127
    expected = values.long() @ weight.long().T
    assert torch.equal(int8.int8_product(values, weight).long(), expected)
    monkeypatch.setattr(int8, "multiplies_int8", lambda device: False)
    assert torch.equal(int8.int8_product(values, weight).long(), expected)
    assert int8.int8_product(values[:0], weight).shape == (0, 17)


def test_a_kernel_that_saturates_is_not_used(monkeypatch):
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: (a.long() @ b.long()).clamp(-(2**15), 2**15 - 1).int())
    int8._multiplies_int8.cache_clear()
    assert not int8.multiplies_int8(torch.device("cpu"))
    int8._multiplies_int8.cache_clear()


@both
def test_gradients_reach_input_and_bias(scheme):
    linear = compressed(scheme)
    x = torch.randn(3, 7, 48, requires_grad=True)
    output = linear(x)
    with torch.no_grad():
        assert torch.equal(output, linear(x))
    weights = torch.randn_like(output)
    (output * weights).sum().backward()
    torch.testing.assert_close(x.grad, weights @ linear.weight)
    torch.testing.assert_close(linear.bias.grad, weights.flatten(0, -2).sum(0))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x).dtype == torch.bfloat16


@both
def test_casts_leave_the_values_alone(scheme):
    linear = compressed(scheme)
    stored = linear.weight_packed
    octets = stored.clone().view(torch.uint8)
    assert linear.to("cpu").weight_packed is stored
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        linear.to(dtype)
        assert linear.weight.dtype == linear.weight_scale.dtype == dtype
        assert linear.weight_packed.dtype == stored.dtype
        assert torch.equal(linear.weight_packed.view(torch.uint8), octets)
        assert linear(torch.randn(2, 48, dtype=dtype)).dtype == dtype
    twin = copy.deepcopy(linear)
    assert torch.equal(twin.weight, linear.weight) and twin.scheme == scheme


@both
def test_state_dict_round_trip_and_attributes(scheme):
    linear = compressed(scheme, torch.bfloat16)
    meta = CompressedLinear.empty(scheme, 48, 20, True, torch.bfloat16, "meta")
    assert {n: (t.shape, t.dtype) for n, t in meta.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in linear.state_dict().items()
    }
    assert set(meta.state_dict()) == {"weight_packed", "weight_scale", "bias"}
    meta.load_state_dict(linear.state_dict(), assign=True)
    assert torch.equal(meta.weight, linear.weight)
    empty = CompressedLinear.empty(scheme, 48, 20, True, torch.bfloat16)
    empty.load_state_dict(linear.state_dict())
    assert torch.equal(empty.weight, linear.weight)
    assert (linear.in_features, linear.out_features, linear.device.type) == (48, 20, "cpu")
    assert count_parameters(linear) == 20 * 48 + 20 and not linear.weight.requires_grad
    held = sum(t.numel() * t.element_size() for n, t in linear.state_dict().items() if n != "bias")
    assert held == scheme.stored_bytes(20, 48)
    assert scheme.name in repr(linear)


@both
def test_the_scheme_survives_compressed_tensors_words(scheme):
    group = group_of(scheme, ["Linear"])
    assert scheme_of(group.weights, group.input_activations) == scheme


@both
def test_peft_trains_an_adapter_on_it(scheme):
    model = nn.Sequential(compressed(scheme), nn.Linear(20, 4))
    config = LoraConfig(target_modules=["0"], r=2, init_lora_weights=False)
    config._register_custom_module({CompressedLinear: lora.Linear})
    wrapped = get_peft_model(model, config)
    wrapped(torch.randn(2, 3, 48)).sum().backward()
    assert any("lora_A" in n and p.grad.abs().sum() > 0 for n, p in wrapped.named_parameters() if p.requires_grad)


def test_embedding_in_float8_and_not_with_int8_inputs():
    result = RTN().solve(torch.randn(30, 16), FP8, None, scale_dtype=torch.bfloat16)
    embedding = CompressedEmbedding.from_quantized(result, 0)
    ids = torch.tensor([[3, 29], [0, 7]])
    assert torch.equal(embedding(ids), embedding.weight[ids])
    with pytest.raises(RecipeError, match="indices"):
        CompressedEmbedding.empty(W8A8, 30, 16, None, torch.float32)


@both
@pytest.mark.parametrize("rounding", [False, True])
def test_opened_for_training_and_closed_again_it_is_the_same(scheme, rounding):
    linear = compressed(scheme, torch.bfloat16, bias=False)
    opened = TrainableLinear(linear, rounding=rounding, dense=linear.weight if rounding else None)
    again = opened.packed()
    assert torch.equal(again.weight_packed.view(torch.uint8), linear.weight_packed.view(torch.uint8))
    assert torch.equal(again.weight, linear.weight) and again.scheme == scheme
    x = torch.randn(2, 5, 48)
    torch.testing.assert_close(opened(x), linear.float()(x), rtol=1e-3, atol=1e-3)
    opened(x.requires_grad_()).square().sum().backward()
    assert opened.log_scale.grad.abs().sum() > 0 and x.grad.abs().sum() > 0


def test_a_range_beyond_what_float16_holds():
    x = (torch.randn(4, 32) * 10).half()
    x[1, 0], x[1, 1] = 60000, -60000
    x[2, 0], x[2, 1] = 65504, -65504
    x[3, 0], x[3, 1] = 65000, -504  # just not beyond
    values, scale, zero_point = int8.quantize_tokens(x, False)
    assert scale.isfinite().all()
    found = (values.double() - zero_point.double()) * scale.double()
    assert ((found - x.double()).abs() <= 1.3 * scale.double()).all()
