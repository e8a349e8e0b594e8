"""Packed Linears in the layouts of torch's kernels: the products, what is saved, and what users do to modules."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from packed_linears import SCHEMES, close, expected, linear_of, optimized

from hf_shrink.errors import ShrinkError
from hf_shrink.plan import Scheme
from hf_shrink.runtime.kernels import int4, kernel_for, nibbles
from hf_shrink.runtime.kernels.blocks import blockwise_linear
from hf_shrink.runtime.kernels.nibbles import gather_nibbles, pack_nibbles, unpack_nibbles
from hf_shrink.runtime.kernels.scales import join_scale, split_scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_products_at_few_and_many_rows(scheme, dtype):
    plain, fast = optimized(scheme, dtype=dtype)
    for rows in (1, 2, 7, 32, 512):
        input = torch.randn(rows, 1536).to(dtype)
        found = fast(input)
        assert found.dtype == dtype
        close(found, expected(plain, input))


@pytest.mark.parametrize("rows", [16, 17, 48, 64, 112, 200])
@pytest.mark.parametrize("columns", [32, 96, 576])
@pytest.mark.parametrize("bits", [4, 8])
def test_shapes(rows, columns, bits):
    plain, fast = optimized(Scheme(bits, False, "group", 32), rows, columns, torch.bfloat16, bias=rows % 2 == 0)
    for count in (1, 40):
        input = torch.randn(count, columns, dtype=torch.bfloat16)
        close(fast(input), expected(plain, input))
        close(fast.kernel.few_rows(input), expected(plain, input) - (0 if fast.bias is None else fast.bias.double()))
        close(blockwise_linear(fast.kernel, input, fast.bias), expected(plain, input))


def test_inputs_of_all_kinds():
    plain, fast = optimized(Scheme(4, True, "group", 64), dtype=torch.bfloat16)
    wide = torch.randn(4, 6, 3072, dtype=torch.bfloat16)
    for input in (
        wide[0, 0, :1536],
        wide[:, :, :1536],
        wide[:, ::2, 1536:],
        wide[:, -1:, ::2],
        wide[..., :1536].transpose(0, 1),
        wide[:, :0, :1536],
        wide[:0, 0, :1536],
        torch.randn(2, 30, 1536).double(),
    ):
        found = fast(input)
        assert found.dtype == input.dtype and found.shape == (*input.shape[:-1], 80)
        close(found, expected(plain, input))
    with torch.autocast("cpu", torch.bfloat16):
        assert fast(torch.randn(2, 1536)).dtype == fast(torch.randn(100, 1536)).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_checkpoints_stay_bit_for_bit(scheme, dtype):
    plain, fast = optimized(scheme, rows=88, dtype=dtype)
    state, kept = plain.state_dict(), fast.state_dict()
    assert list(state) == list(kept)
    for name, tensor in state.items():
        assert kept[name].dtype == tensor.dtype and torch.equal(kept[name], tensor), name
    assert torch.equal(fast.weight, plain.weight)
    fast.restore()
    assert fast.kernel is None and list(fast.state_dict()) == list(state)
    other = linear_of(scheme, rows=88, dtype=dtype)
    other.optimize()
    other.load_state_dict(state)
    assert other.kernel is not None and torch.equal(other.weight, plain.weight)


def test_the_weight_is_held_once():
    plain, fast = optimized(Scheme(4, True, "group", 64), 576, 1536)
    held = sum(t.numel() * t.element_size() for t in fast.buffers())
    assert held <= 1.15 * sum(t.numel() * t.element_size() for t in plain.buffers())
    assert not any(name.startswith("weight_packed") for name, _ in fast.named_buffers())


def test_gradients_reach_input_and_bias():
    plain, fast = optimized(Scheme(4, False, "group", 64))
    for rows in (3, 100):
        one, other = (torch.randn(rows, 1536, requires_grad=True) for _ in range(2))
        other.data.copy_(one.data)
        plain.zero_grad(), fast.zero_grad()
        factor = torch.randn(rows, 80)
        (plain(one) * factor).sum().backward()
        (fast(other) * factor).sum().backward()
        close(other.grad, one.grad.double())
        torch.testing.assert_close(fast.bias.grad, plain.bias.grad)


def test_casts_moves_and_copies():
    plain, fast = optimized(Scheme(4, False, "group", 64))
    input = torch.randn(3, 1536)
    wanted = fast(input)
    for same in (
        copy.deepcopy(fast),
        copy.deepcopy(fast).to("cpu").float().eval(),
        copy.deepcopy(fast).bfloat16().float().requires_grad_(False),
    ):
        assert same.kernel is not None
        torch.testing.assert_close(same(input), wanted, rtol=0.03, atol=0.3)
    twin = copy.deepcopy(fast)
    twin._buffers["kernel_weight"].zero_()
    assert not torch.equal(twin(input), wanted) and torch.equal(fast(input), wanted)
    for cast in (torch.bfloat16, torch.float16):
        one, other = copy.deepcopy(plain).to(cast), copy.deepcopy(fast).to(cast)
        assert other.kernel is not None and other.weight_scale.dtype == cast
        assert torch.equal(one.weight, other.weight)
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(input), wanted)
    on_meta = copy.deepcopy(fast).to("meta")
    assert on_meta.weight_packed.is_meta and on_meta.kernel is None


@pytest.mark.parametrize("rows", [16, 32, 48, 64, 80, 128, 192])
def test_nibbles_come_back(rows):
    values = torch.randint(16, (rows, 34), dtype=torch.uint8)
    packed = pack_nibbles(values)
    assert torch.equal(unpack_nibbles(packed), values)
    some = torch.tensor([0, rows - 1, rows // 2, 1, rows - 1])
    assert torch.equal(gather_nibbles(packed, some), values[some])


def test_scales_come_back():
    bits = torch.arange(0x38000000, 0x3F000000, 4999, dtype=torch.int32)
    ties = (torch.arange(0x3800, 0x3810, dtype=torch.int32) << 16) + 0x8000
    scale = torch.cat([bits, ties]).view(torch.float32)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for stored in (scale.to(dtype), -scale.to(dtype)):
            near, rest = split_scale(stored)
            assert (near.double() / stored.double() - 1).abs().max() <= 2**-8
            back = join_scale(near, rest, dtype)
            assert back.dtype == dtype and torch.equal(back, stored)
    assert split_scale(torch.tensor([0.5, 0.25]))[1] is None


def test_what_has_no_kernel_says_why():
    cpu = torch.device("cpu")
    for scheme, device, word in (
        (Scheme(4, True, "group", 16), cpu, "32"),
        (Scheme(8, True, "channel", None, "float"), cpu, "FP8A16"),
        (Scheme(4), torch.device("meta"), "meta"),
    ):
        kind, note = kernel_for(scheme, 64, 1536, device, torch.float32)
        assert kind is None and word in note
    assert kernel_for(Scheme(4), 64, 1536, cpu, torch.float64)[0] is None


@pytest.mark.parametrize("scheme", [Scheme(4, False, "group", 64), Scheme(8, True, "channel", None)], ids=str)
def test_compiles_as_one_graph(scheme):
    _, fast = optimized(scheme, rows=72, columns=128, dtype=torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    for tokens in (1, 300):
        input = torch.randn(1, tokens, 128, dtype=torch.bfloat16)
        with torch.no_grad():
            torch.testing.assert_close(compiled(input), fast(input))
    input = torch.randn(1, 3, 128, dtype=torch.bfloat16, requires_grad=True)
    compiled(input).sum().backward()
    assert input.grad.abs().sum() > 0


def test_what_comes_from_memory_is_held_in_planes():
    scheme, device = Scheme(8, True, "channel", None), torch.device("cpu")
    assert kernel_for(scheme, 49152, 576, device, torch.bfloat16)[1] == "int4 twice"
    assert kernel_for(scheme, 4096, 576, device, torch.bfloat16)[1] == "int8"
    assert kernel_for(scheme, 524288, 48, device, torch.bfloat16)[0] is None


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_unpacked_it_is_the_stored_weight(bits, dtype):
    """Zero points are in the kernel's scales, rounded to bfloat16; what is stored are whole numbers."""
    plain, fast = optimized(Scheme(bits, False, "group", 64), dtype=dtype)
    assert torch.equal(fast.kernel.unpacked(0, fast.out_features, dtype).T, plain.weight)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda fast: pickle.loads(pickle.dumps(fast))])
def test_a_pickle_is_not_read_in_another_layout(duplicate, monkeypatch):
    """That would give other products, without an error."""
    plain, fast = optimized(Scheme(4, True, "group", 32))
    input = torch.randn(3, 1536)
    assert torch.equal(duplicate(fast)(input), fast(input))
    pickled = pickle.dumps(fast)
    other = next(layout for layout in nibbles._KNOWN if layout != nibbles.kernel_layout())
    monkeypatch.setattr(int4, "kernel_layout", lambda: other)
    with pytest.raises(ShrinkError, match=r"save_pretrained|restore_layout"):
        pickle.loads(pickled)
    pickle.loads(pickle.dumps(plain))
    monkeypatch.undo()
    again, (kind, _, blocks, parts) = fast.kernel.__reduce__()
    with pytest.raises(ShrinkError, match="for cuda"):  # mapped to the CPU
        again(kind, "cuda", blocks, parts)
