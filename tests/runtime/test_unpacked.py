"""Dense copies are kept inside the context only, and nothing that is computed changes."""

from __future__ import annotations

import torch
from torch import nn

from hf_shrink.plan import Scheme
from hf_shrink.quantization.rtn import RTN
from hf_shrink.runtime.linear import CompressedLinear
from hf_shrink.runtime.unpacked import kept_dense

W8A8 = Scheme(bits=8, strategy="channel", group_size=None, activation_bits=8)


def packed(scheme: Scheme) -> CompressedLinear:
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    return CompressedLinear.from_quantized(RTN().solve(weight, scheme, None, scale_dtype=torch.float32), None)


def test_the_weight_is_unpacked_once_and_products_are_equal_to_the_bit() -> None:
    linear = packed(Scheme(bits=4, group_size=32))
    x = torch.randn(3, 5, 64, requires_grad=True)
    before = linear(x)
    (gradient,) = torch.autograd.grad(before.sum(), x)
    with kept_dense(nn.ModuleList([linear])):
        assert linear.weight is linear.weight
        inside = linear(x)
        assert torch.equal(torch.autograd.grad(inside.sum(), x)[0], gradient)
    assert torch.equal(inside, before)
    assert linear.weight is not linear.weight
    assert not [name for name in linear.state_dict() if "dense" in name]


def test_integers_and_kernels_are_left_alone() -> None:
    whole, kernel = packed(W8A8), packed(Scheme(bits=4, group_size=32))
    kernel.optimize()
    with kept_dense(nn.ModuleList([whole, kernel])):
        assert whole.kept_dense is None
        assert (kernel.kept_dense is None) == (kernel.kernel is not None)


def test_a_copy_kept_outside_is_not_let_go_inside() -> None:
    linear = packed(Scheme(bits=4, group_size=32))
    with kept_dense(linear):
        with kept_dense(linear):
            pass
        assert linear.kept_dense is not None
    assert linear.kept_dense is None
