"""CompressedLinear: the checkpoint it is, the Linear it replaces, and that nothing dense stays behind."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import nn
from torch.nn import functional as F

from hf_shrink.plan import Scheme
from hf_shrink.quantization.rtn import RTN
from hf_shrink.runtime import CompressedLinear, count_parameters

SCHEMES = [
    Scheme(bits, symmetric, strategy, size)
    for bits in (2, 3, 4, 8)
    for symmetric in (True, False)
    for strategy, size in (("tensor", None), ("channel", None), ("group", 16))
]
SCHEME = Scheme(4, False, "group", 16)


def compressed(scheme: Scheme = SCHEME, dtype=torch.float32, bias=True, out=20, columns=48) -> CompressedLinear:
    weight = torch.randn(out, columns) + 0.2
    result = RTN().solve(weight, scheme, None, scale_dtype=dtype)
    return CompressedLinear.from_quantized(result, nn.Parameter(torch.randn(out, dtype=dtype)) if bias else None)


def dense_twin(linear: CompressedLinear) -> nn.Linear:
    twin = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
    twin.weight = nn.Parameter(linear.weight)
    if linear.bias is not None:
        twin.bias = nn.Parameter(linear.bias.detach().clone())
    return twin


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_stock_decompression_gives_exactly_our_weight(scheme, dtype):
    weight = torch.randn(20, 48) + 0.2
    result = RTN().solve(weight, scheme, None, scale_dtype=dtype)
    linear = CompressedLinear.from_quantized(result, None)
    arguments = QuantizationArgs(
        num_bits=scheme.bits, symmetric=scheme.symmetric, strategy=scheme.strategy, group_size=scheme.group_size
    )
    stock_scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    state = dict(linear.state_dict())
    names = set(PackedQuantizationCompressor.compression_param_names(stock_scheme))
    assert set(state) == names
    stock = PackedQuantizationCompressor.decompress(state, stock_scheme)["weight"]
    assert stock.dtype == linear.weight.dtype == dtype
    assert torch.equal(stock, linear.weight)
    if dtype != torch.float32:
        return
    assert torch.equal(linear.weight, result.dequantized())
    # And the bytes are those that compressed-tensors writes for this weight.
    dense = {"weight": stock, "weight_scale": state["weight_scale"]}
    if not scheme.symmetric:
        dense["weight_zero_point"] = result.grid.zero_point.reshape(state["weight_scale"].shape)
    packed = PackedQuantizationCompressor.compress(dense, stock_scheme)
    for name in names:
        assert torch.equal(packed[name], state[name]), name


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_is_that_of_a_linear(dtype, bias):
    linear = compressed(dtype=dtype, bias=bias)
    x = torch.randn(2, 5, 48, dtype=dtype)
    assert torch.equal(linear(x), dense_twin(linear)(x))
    with torch.no_grad():
        assert torch.equal(linear(x), dense_twin(linear)(x))
    wider = linear(x.double())
    assert wider.dtype == torch.float64
    assert linear(x[0, 0]).shape == (20,)


def test_gradients_reach_input_and_bias():
    linear = compressed()
    twin = dense_twin(linear)
    x = torch.randn(3, 7, 48, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    (linear(x) ** 2).sum().backward()
    (twin(y) ** 2).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(linear.bias.grad, twin.bias.grad)
    assert torch.autograd.gradcheck(linear, torch.randn(2, 48, dtype=torch.float64, requires_grad=True))


def test_gradients_under_autocast():
    linear = compressed()
    x = torch.randn(4, 48, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = linear(x)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert x.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad, linear.weight.sum(0).expand(4, -1), rtol=0.05, atol=0.1)


def test_nothing_dense_stays_behind():
    linear = compressed(bias=False, out=37, columns=80)

    def dense_tensors() -> int:
        gc.collect()
        return sum(type(o) in (torch.Tensor, nn.Parameter) and o.shape == (37, 80) for o in gc.get_objects())

    before = dense_tensors()
    x = torch.randn(2, 80, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        output = linear(x)
    assert (37, 80) not in saved and (80, 37) not in saved
    output.sum().backward()
    with torch.no_grad():
        linear(x)
    assert dense_tensors() == before
    held = sum(t.numel() * t.element_size() for t in linear.state_dict().values())
    assert held < 37 * 80 * 4 / 4


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_state_dict_round_trip(scheme):
    linear = compressed(scheme, torch.bfloat16)
    empty = CompressedLinear.empty(scheme, 48, 20, True, torch.bfloat16)
    empty.load_state_dict(linear.state_dict())
    assert torch.equal(empty.weight, linear.weight) and torch.equal(empty.bias, linear.bias)
    meta = CompressedLinear.empty(scheme, 48, 20, True, torch.bfloat16, "meta")
    for name, tensor in meta.state_dict().items():
        assert tensor.is_meta and tensor.shape == linear.state_dict()[name].shape, name
        assert tensor.dtype == linear.state_dict()[name].dtype, name
    meta.load_state_dict(linear.state_dict(), assign=True)
    assert torch.equal(meta.weight, linear.weight)


def test_casts_touch_floats_only():
    linear = compressed()
    packed = linear.weight_packed.clone()
    for cast, dtype in (
        (lambda m: m.half(), torch.float16),
        (lambda m: m.to(torch.bfloat16), torch.bfloat16),
        (lambda m: m.float(), torch.float32),
    ):
        cast(linear)
        assert linear.weight.dtype == linear.weight_dtype == linear.weight_scale.dtype == linear.bias.dtype == dtype
        assert linear.weight_packed.dtype == linear.weight_zero_point.dtype == torch.int32
        assert linear.weight_shape.tolist() == [20, 48]
        assert torch.equal(linear.weight_packed, packed)
        assert linear(torch.randn(2, 48, dtype=dtype)).dtype == dtype


def test_compute_dtype_until_the_next_cast():
    linear = compressed(dtype=torch.bfloat16)
    linear.compute_dtype = torch.float32
    assert linear.weight.dtype == torch.float32 and linear.weight_scale.dtype == torch.bfloat16
    linear.to("cpu")
    assert linear.weight_dtype == torch.float32
    linear.half()
    assert linear.weight.dtype == torch.float16


def test_copies_are_equal_and_apart():
    linear = compressed()
    twin = copy.deepcopy(linear)
    assert torch.equal(twin.weight, linear.weight) and twin.scheme == linear.scheme
    twin.weight_scale.zero_()
    assert linear.weight.count_nonzero() > 0


def test_attributes_and_parameter_count():
    linear = compressed()
    assert (linear.in_features, linear.out_features, linear.device.type) == (48, 20, "cpu")
    assert linear.numel == 20 * 48
    model = nn.Sequential(nn.Linear(4, 48), linear, nn.ModuleList([linear]))
    assert count_parameters(model) == 4 * 48 + 48 + 20 * 48 + 20
    assert "W4A16 g16 asymmetric" in repr(linear)
    assert not linear.weight.requires_grad


def test_a_frozen_bias_stays_frozen():
    result = RTN().solve(torch.randn(4, 16), Scheme(4, True, "channel", None), None, scale_dtype=torch.float32)
    bias = nn.Parameter(torch.ones(4), requires_grad=False)
    linear = CompressedLinear.from_quantized(result, bias)
    assert not linear.bias.requires_grad
    x = torch.randn(2, 16)
    assert torch.equal(linear(x), F.linear(x, linear.weight, bias))


def test_gradients_of_a_single_vector():
    linear = compressed()
    twin = dense_twin(linear)
    x = torch.randn(48, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    (linear(x) ** 2).sum().backward()
    (twin(y) ** 2).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(linear.bias.grad, twin.bias.grad)
