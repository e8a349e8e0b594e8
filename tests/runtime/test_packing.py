"""Packed bytes are compressed-tensors' own, and our unpacking is its inverse."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

from hf_shrink.plan import BITS, Scheme
from hf_shrink.runtime import packing


def values_of(bits: int, rows: int, columns: int) -> torch.Tensor:
    """Random int8 of `bits` bits that holds both extremes."""
    values = torch.randint(-(1 << bits - 1), 1 << bits - 1, (rows, columns)).to(torch.int8)
    values[0, 0], values[-1, -1] = -(1 << bits - 1), (1 << bits - 1) - 1
    return values


@pytest.mark.parametrize("columns", [1, 5, 31, 32, 33, 64, 100, 257])
@pytest.mark.parametrize("bits", BITS)
def test_unpack_inverts_the_stock_packing(bits, columns):
    values = values_of(bits, 7, columns)
    packed = packing.pack(values, bits)
    assert torch.equal(packed, pack_to_int32(values, bits))
    assert packed.shape == (7, -(-columns * bits // 32))
    assert torch.equal(packing.unpack(packed, bits, columns), values)
    assert torch.equal(packing.unpack(packed, bits, columns), unpack_from_int32(packed, bits, values.shape))


def test_unpack_leaves_the_packed_words_alone():
    for bits in BITS:
        packed = packing.pack(values_of(bits, 3, 64), bits)
        before = packed.clone()
        packing.unpack(packed, bits, 64)
        assert torch.equal(packed, before)


@pytest.mark.parametrize("rows", [1, 8, 37])
@pytest.mark.parametrize("bits", BITS)
def test_zero_points(bits, rows):
    zero = values_of(bits, rows, 3)
    scheme = Scheme(bits, False, "group", 16)
    stored = packing.pack_zero_point(zero, scheme)
    assert torch.equal(stored, pack_to_int32(zero, bits, packed_dim=0))
    assert torch.equal(packing.unpack_zero_point(stored, scheme, rows), zero)
    single = packing.pack_zero_point(zero[:1, :1], Scheme(bits, False, "tensor", None))
    assert single.dtype == torch.int8 and single.shape == (1,)


def test_chunks_do_not_show(monkeypatch):
    scheme, values = Scheme(3, False, "group", 16), values_of(3, 21, 48)
    zero, scale = values_of(3, 21, 3), torch.randn(21, 3)
    arguments = (packing.pack(values, 3), scale, zero, scheme, 48, torch.float32)
    whole = packing.unpack_weight(*arguments)
    monkeypatch.setattr(packing, "CHUNK_VALUES", 100)
    assert torch.equal(packing.unpack_weight(*arguments), whole)
    expected = (values.view(21, 3, 16) - zero[..., None]).float() * scale[..., None]
    assert torch.equal(whole, expected.view(21, 48))


def test_the_product_is_taken_in_the_wider_dtype():
    scheme, values = Scheme(8, True, "channel", None), values_of(8, 4, 32)
    scale = (torch.rand(4, 1) * 1e-9).float()  # below what float16 can hold
    weight = packing.unpack_weight(packing.pack(values, 8), scale, None, scheme, 32, torch.float16)
    assert torch.equal(weight, (values.float() * scale).half())
    wide = packing.unpack_weight(packing.pack(values, 8), scale.bfloat16(), None, scheme, 32, torch.float32)
    assert torch.equal(wide, values.float() * scale.bfloat16().float())
