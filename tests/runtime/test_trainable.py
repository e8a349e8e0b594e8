from __future__ import annotations

import pytest
import torch

from hf_shrink.ops.grid import min_max_grid, quantize, search_grid
from hf_shrink.ops.quantized import QuantizedWeight
from hf_shrink.plan import Scheme
from hf_shrink.runtime.linear import CompressedLinear
from hf_shrink.runtime.trainable import TrainableLinear

SCHEMES = [
    Scheme(4, True, "group", 8),
    Scheme(2, False, "group", 8),
    Scheme(3, False, "channel", None),
    Scheme(8, True, "tensor", None),
    Scheme(4, False, "tensor", None),
]


def packed(scheme: Scheme, dtype: torch.dtype = torch.float32) -> tuple[CompressedLinear, torch.Tensor]:
    weight = torch.randn(6, 24, generator=torch.Generator().manual_seed(0))
    grid = search_grid(weight, scheme, None, dtype)
    return CompressedLinear.from_quantized(QuantizedWeight(quantize(weight, grid), grid, 0.0), torch.randn(6)), weight


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounding", [False, True])
def test_it_begins_as_the_packed_module_and_packs_to_the_same_bytes(
    scheme: Scheme, dtype: torch.dtype, rounding: bool
) -> None:
    linear, weight = packed(scheme, dtype)
    for dense in (None, weight):
        trainable = TrainableLinear(linear, rounding=rounding, dense=dense)
        torch.testing.assert_close(
            trainable.weight, linear.weight.float(), rtol=2e-2 if dtype != torch.float32 else 0, atol=0
        )
        again = trainable.packed()
        for name, buffer in linear.state_dict().items():
            assert torch.equal(buffer, again.state_dict()[name]), name


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_gradients_are_those_of_the_product_with_rounding_taken_as_the_identity(scheme: Scheme) -> None:
    linear, _ = packed(scheme)
    trainable = TrainableLinear(linear, rounding=True)
    weight = trainable.weight
    outer = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    (weight * outer).sum().backward()
    groups = (6, -1, scheme.group_size or 24)
    scale = (trainable.initial_scale * trainable.log_scale.exp()).double()
    zero = 0.0 if trainable.zero is None else trainable.zero.double()
    outer = outer.double().view(groups)
    expected = (outer * scale).expand(groups)
    torch.testing.assert_close(trainable.steps.grad.double(), outer * scale)
    by_scale = outer * (trainable.steps.double() - zero) * scale  # d/da of s exp(a) (q - z)
    whole = (0, 1, 2) if scheme.strategy == "tensor" else (2,)
    torch.testing.assert_close(
        trainable.log_scale.grad.double(), by_scale.sum(whole, keepdim=True), rtol=1e-5, atol=1e-6
    )
    if trainable.zero is not None:
        torch.testing.assert_close(
            trainable.zero.grad.double(), -expected.sum(whole, keepdim=True), rtol=1e-5, atol=1e-6
        )


def test_what_was_trained_is_what_is_packed() -> None:
    linear, weight = packed(Scheme(2, False, "group", 8), torch.bfloat16)
    trainable = TrainableLinear(linear, rounding=True, dense=weight)
    with torch.no_grad():
        for parameter in (trainable.log_scale, trainable.zero, trainable.steps):
            parameter += 0.7 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    after = trainable.packed()
    torch.testing.assert_close(
        after.weight.float(), trainable.weight.detach(), rtol=1e-2, atol=0
    )  # one rounding to bf16
    assert not torch.equal(after.weight_packed, linear.weight_packed)
    assert torch.equal(after.unpacked()[0], trainable.quantized().values)


def test_a_weight_between_two_integers_starts_on_its_own_side() -> None:
    scheme = Scheme(4, True, "channel", None)
    weight = torch.tensor([[7.0, 2.4, -3.3, 0.0]])
    grid = min_max_grid(weight, scheme, torch.float32)
    linear = CompressedLinear.from_quantized(QuantizedWeight(quantize(weight, grid), grid, 0.0), None)
    offset = TrainableLinear(linear, rounding=True, dense=weight).steps.detach() - linear.unpacked()[0].view(1, 1, -1)
    wanted = (weight / grid.scale - linear.unpacked()[0]).view(1, 1, -1)
    assert torch.equal(offset.sign(), wanted.sign())
    assert float(offset.abs().max()) <= 0.25
