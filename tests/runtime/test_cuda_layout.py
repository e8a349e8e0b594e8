"""What the CUDA kernels reckon with, held against slow references on the CPU: the layout, the split, the modules."""

from __future__ import annotations

import copy

import pytest
import torch
from packed_linears import SCHEMES, close, expected, linear_of
from torch.nn import functional as F

from hf_shrink.plan import Scheme
from hf_shrink.quantization.rtn import RTN
from hf_shrink.runtime.kernels import int4_cuda, kernel_for, octets, tiles
from hf_shrink.runtime.kernels.blocks import blockwise_linear
from hf_shrink.runtime.kernels.int4_cuda import TiledInt4, TiledTwoPlanes
from hf_shrink.runtime.kernels.octets import Float8, Int8Tokens, as_two_float8

FP8 = Scheme(8, True, "channel", None, "float")
W8A8 = Scheme(8, True, "channel", None, "int", 8)


def packed_slowly(values: torch.Tensor) -> torch.Tensor:
    """The words that torch makes, by the second operand of PTX's mma.m16n8k16: lane t of 32 holds, of column n = t / 4,
    the rows 2 (t % 4) + i % 2 + 8 (i / 2) for i from 0 to 3. Here rows and columns are the other way round."""
    rows, columns = values.shape
    inner = tiles.inner_tiles(columns)
    words = torch.zeros(rows // 8, columns // (16 * inner), 32, inner // 2, dtype=torch.int64)
    for row in range(rows):
        for column in range(columns):
            tile, inside = divmod(column, 16)
            supertile, place = divmod(tile, inner)
            lane = row % 8 * 4 + inside % 8 // 2
            i = inside % 2 + 2 * (inside // 8)
            nibble = (0, 2, 4, 6, 1, 3, 5, 7).index(place % 2 * 4 + i)
            words[row // 8, supertile, lane, place // 2] |= int(values[row, column]) << 4 * nibble
    return words.to(torch.uint32).view(torch.int32)


def multiplied_slowly(x: torch.Tensor, packed: torch.Tensor, group: int, scales: torch.Tensor) -> torch.Tensor:
    """As the kernel says of itself: the weight in bfloat16, (q - 8) * scale + zero rounded once; sums are wider."""
    values = tiles.unpack_tiles(packed).float() - 8
    scale, zero = scales.float().unbind(-1)
    weight = (values * scale.repeat_interleave(group, 0).T + zero.repeat_interleave(group, 0).T).bfloat16()
    return (x.double() @ weight.double().T).bfloat16()


def float8_slowly(x: torch.Tensor, scales: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return F.linear(x.float() * scales, weight.float() * scale[:, None]).bfloat16()


@pytest.fixture(autouse=True)
def cuda_on_cpu(monkeypatch):
    """What only CUDA has, slowly, so that the modules around it can be tried."""
    for place in (tiles, int4_cuda):
        monkeypatch.setattr(place, "pack_tiles", packed_slowly)
    monkeypatch.setattr(torch, "_weight_int4pack_mm", multiplied_slowly)
    monkeypatch.setattr(octets, "float8_product", float8_slowly)
    tiles.check_layout.cache_clear()
    yield
    tiles.check_layout.cache_clear()


@pytest.mark.parametrize("columns", [32, 64, 96, 256])
def test_tiles_come_back(columns):
    values = torch.randint(16, (24, columns), dtype=torch.uint8)
    packed = packed_slowly(values)
    assert torch.equal(tiles.unpack_tiles(packed), values)
    rows = torch.tensor([23, 0, 9, 9])
    assert torch.equal(tiles.gather_tiles(packed, rows), values[rows])


def held(scheme: Scheme, kind, dtype=torch.bfloat16, rows=40, columns=384):
    """A packed Linear, and its copy on a kernel of CUDA's."""
    plain = linear_of(scheme, rows, columns, dtype)
    fast = copy.deepcopy(plain)
    fast.use_kernel(kind.pack(*plain.unpacked(), few=4))
    return plain, fast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.group_size in (None, 32, 64, 128)], ids=str)
def test_modules_on_tiles(scheme, dtype):
    kind = TiledInt4 if scheme.bits <= 4 else TiledTwoPlanes
    plain, fast = held(scheme, kind, dtype)
    assert fast.kernel.tensors["weight"].dtype == torch.int32
    for count in (1, 3, 9):
        input = torch.randn(count, 384).to(dtype)
        close(fast(input), expected(plain, input))
        close(blockwise_linear(fast.kernel, input, fast.bias), expected(plain, input))
    for name, tensor in plain.state_dict().items():
        assert torch.equal(fast.state_dict()[name], tensor), name
    some = torch.tensor([39, 0, 17])
    values, grid = plain.unpacked()
    assert torch.equal(fast.kernel.values(some), values[some])
    if scheme.strategy != "tensor":
        assert torch.equal(fast.kernel.scale(some), grid.scale[some])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("scheme", "kind"), [(FP8, Float8), (W8A8, Int8Tokens)], ids=["fp8", "w8a8"])
def test_modules_of_octets(scheme, kind, dtype):
    plain, fast = held(scheme, kind, dtype)
    for count in (1, 9):
        input = torch.randn(2, count, 384).to(dtype)
        found = fast(input)
        assert found.dtype == dtype
        if kind is Float8:
            close(found, expected(plain, input))
        else:
            torch.testing.assert_close(found, plain(input), rtol=0, atol=0)
        tracked = input.clone().requires_grad_()
        fast(tracked).float().sum().backward()
        close(tracked.grad, plain.weight.double().sum(0).expand_as(input))
    for name, tensor in plain.state_dict().items():
        kept = fast.state_dict()[name]
        assert kept.dtype == tensor.dtype and torch.equal(kept.double(), tensor.double()), name
    back = copy.deepcopy(fast)
    back.restore()
    assert back.kernel is None and torch.equal(back.weight, plain.weight)


def test_a_bfloat16_is_the_sum_of_two_float8():
    tokens = (torch.randn(7, 4096) * torch.logspace(-20, 20, 7)[:, None]).bfloat16()
    tokens[3] = 0
    tokens[4, 0] = -(2.0**60)  # all others vanish beside it
    values, scales = as_two_float8(tokens)
    assert torch.equal(torch.frexp(scales).mantissa, torch.full_like(scales, 0.5))
    first, second = (values.double() * scales.double()).chunk(2)
    near = tokens.abs() > tokens.abs().amax(1, keepdim=True) * 2.0**-13
    assert torch.equal((first + second)[near], tokens.double()[near])
    lost = (first + second - tokens.double()).abs().amax(1)
    assert (lost <= tokens.abs().amax(1).double() * 2.0**-20).all()


def test_schemes_and_shapes_find_their_kernel(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for kind in (Float8, Int8Tokens):
        monkeypatch.setattr(kind, "works", classmethod(lambda cls, device: True))
    for scheme, kind in (
        (Scheme(4), TiledInt4),
        (Scheme(2, False, "group", 64), TiledInt4),
        (Scheme(8, True, "channel", None), TiledTwoPlanes),
        (FP8, Float8),
        (W8A8, Int8Tokens),
    ):
        for rows in (4096, 49152):
            assert kernel_for(scheme, rows, 512, gpu, torch.bfloat16)[0] is kind
    assert "multiples of 16" in kernel_for(FP8, 4096, 520, gpu, torch.bfloat16)[1]
    assert "up to" in kernel_for(Scheme(4), 1 << 20, 512, gpu, torch.bfloat16)[1]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "8.0" in kernel_for(Scheme(4), 4096, 512, gpu, torch.bfloat16)[1]
    assert kernel_for(Scheme(4), 4096, 512, torch.device("mps"), torch.bfloat16)[0] is None


def test_a_layout_that_is_not_known_is_refused(monkeypatch):
    from hf_shrink.errors import ShrinkError

    monkeypatch.setattr(tiles, "pack_tiles", lambda values: packed_slowly(values.flip(0)))
    with pytest.raises(ShrinkError, match="layout"):
        TiledInt4.pack(*linear_of(Scheme(4, True, "group", 32), 16, 64).unpacked(), few=1)


def test_float8_weights_use_all_of_their_values():
    weight = torch.randn(32, 64)
    found = RTN().solve(weight, FP8, None, scale_dtype=torch.float32)
    kernel = Float8.pack(found.values, found.grid, few=8)
    assert torch.equal(kernel.unpacked(0, 32, torch.float32).T, found.dequantized())
