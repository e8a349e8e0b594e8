"""On a GPU: the kernels' products, what users do to modules, compiled decoding, and compression itself.

    python -m pytest tests/runtime/test_cuda.py -n 0

Without a GPU all of it is skipped, and stays unmeasured.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from packed_linears import SCHEMES, close, expected, linear_of, optimized
from tiny import tiny_llama
from transformers import CompileConfig, StaticCache

from hf_shrink import kernel_summary, optimize_for_inference, shrink, shrink_checkpoint
from hf_shrink.checkpoint import device as devices
from hf_shrink.evaluation import evaluate_model
from hf_shrink.plan import Scheme
from hf_shrink.residence import Residence
from hf_shrink.runtime import CompressedLinear, int8
from hf_shrink.runtime.kernels import tiles
from hf_shrink.runtime.kernels.blocks import blockwise_linear

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here: unmeasured")

FP8 = Scheme(8, True, "channel", None, "float")
W8A8 = Scheme(8, True, "channel", None, "int", 8)
PLAIN = Scheme(8, True, "channel", None, "int", 8, activation_symmetric=True)
TOKENS = (1, 2, 16, 17, 64, 512)


@pytest.mark.parametrize("columns", [32, 64, 96, 576, 2048])
def test_torch_lays_tiles_as_we_read_them(columns):
    values = torch.randint(16, (48, columns), dtype=torch.uint8, device="cuda")
    packed = tiles.pack_tiles(values)
    assert torch.equal(tiles.unpack_tiles(packed), values)
    some = torch.tensor([47, 0, 9, 9], device="cuda")
    assert torch.equal(tiles.gather_tiles(packed, some), values[some])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", [*SCHEMES, FP8], ids=str)
def test_products_by_kernel_and_by_blocks(scheme, dtype):
    plain, fast = optimized(scheme, device="cuda", dtype=dtype)
    assert fast.kernel.name in ("int4", "int4 twice", "float8")
    for count in TOKENS:
        input = torch.randn(count, 1536).to(dtype)
        wanted, there = expected(plain, input), input.cuda()
        found = fast(there)
        assert found.dtype == dtype and found.is_cuda
        close(found, wanted)
        close(blockwise_linear(fast.kernel, there, fast.bias), wanted)
        close(fast.kernel.few_rows(there.bfloat16()), wanted - plain.bias.detach().double())


@pytest.mark.parametrize("rows", [16, 48, 72, 200])
@pytest.mark.parametrize("columns", [32, 96, 576])
@pytest.mark.parametrize("bits", [4, 8])
def test_shapes(rows, columns, bits):
    plain, fast = optimized(Scheme(bits, False, "group", 32), rows, columns, torch.bfloat16, False, device="cuda")
    for count in (1, 40):
        input = torch.randn(count, columns, dtype=torch.bfloat16)
        close(fast.kernel.few_rows(input.cuda()), expected(plain, input))
        close(blockwise_linear(fast.kernel, input.cuda(), None), expected(plain, input))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", [W8A8, PLAIN], ids=["w8a8", "symmetric"])
def test_rounded_inputs_give_the_integers_that_they_give_on_the_cpu(scheme, dtype):
    assert int8.multiplies_int8(torch.device("cuda"))
    plain, fast = optimized(scheme, device="cuda", dtype=dtype)
    assert fast.kernel.always
    for count in TOKENS:
        input = torch.randn(2, count, 1536).to(dtype)
        tokens, there = (int8.quantize_tokens(x, scheme.activation_symmetric) for x in (input, input.cuda()))
        # A quotient half way between two integers may fall to either side.
        assert ((tokens.values.int() - there.values.cpu().int()).abs() <= 1).all()
        assert (tokens.values != there.values.cpu()).float().mean() < 1e-3
        close(fast(input.cuda()), plain(input).double())


def test_inputs_of_all_kinds():
    plain, fast = optimized(Scheme(4, True, "group", 64), device="cuda", dtype=torch.bfloat16)
    wide = torch.randn(4, 6, 3072, dtype=torch.bfloat16)
    for input in (
        wide[0, 0, :1536],
        wide[:, ::2, 1536:],
        wide[:, -1:, ::2],
        wide[..., :1536].transpose(0, 1),
        wide[:, :0, :1536],
        torch.randn(2, 30, 1536).double(),
    ):
        found = fast(input.cuda())
        assert found.dtype == input.dtype and found.shape == (*input.shape[:-1], 80)
        close(found, expected(plain, input))
    with torch.autocast("cuda", torch.bfloat16):
        assert fast(torch.randn(2, 1536).cuda()).dtype == fast(torch.randn(9000, 1536).cuda()).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", [*SCHEMES, FP8, W8A8], ids=str)
def test_checkpoints_and_moves_stay_bit_for_bit(scheme, dtype):
    plain, fast = optimized(scheme, rows=96, device="cuda", dtype=dtype)
    state, kept = plain.state_dict(), fast.state_dict()
    assert list(state) == list(kept)
    for name, tensor in state.items():
        assert kept[name].is_cuda and kept[name].dtype == tensor.dtype
        assert torch.equal(kept[name].cpu().double(), tensor.double()), name
    back = copy.deepcopy(fast).cpu()
    assert torch.equal(back.weight, plain.weight) and back.device.type == "cpu"
    again = back.cuda()
    assert again.kernel is not None and type(again.kernel) is type(fast.kernel)
    assert torch.equal(again.weight.cpu(), plain.weight)


def test_gradients_reach_input_and_bias():
    for scheme in (Scheme(4, False, "group", 64), FP8, W8A8):
        plain, fast = optimized(scheme, device="cuda")
        for rows in (3, 5000):
            one = torch.randn(rows, 1536, requires_grad=True)
            other = one.detach().cuda().requires_grad_()
            factor = torch.randn(rows, 80)
            plain.zero_grad(), fast.zero_grad()
            (plain(one) * factor).sum().backward()
            (fast(other) * factor.cuda()).sum().backward()
            close(other.grad, one.grad.double())
            torch.testing.assert_close(fast.bias.grad.cpu(), plain.bias.grad, rtol=1e-4, atol=1e-3)


def small_llama(**changes: Any) -> Any:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2}
    return tiny_llama(**sizes, num_hidden_layers=3, head_dim=32, **changes).to(torch.bfloat16).cuda()


def rounded(scheme: str, **quantize: Any) -> Any:
    """A model, and the same on the reference path."""
    torch.manual_seed(0)
    quantize = {"method": "rtn", "scheme": scheme, **quantize}
    recipe = {"portable": False, "steps": [{"quantize": quantize}]}
    plain = shrink(small_llama(tie_word_embeddings=True), recipe, progress=False, optimize=False)
    return optimize_for_inference(copy.deepcopy(plain)), plain


@pytest.mark.parametrize("scheme", ["W4A16", "W2A16", "W8A16", "W8A8", "FP8A16"])
def test_a_whole_model_says_what_its_reference_path_says(scheme):
    fast, plain = rounded(scheme, **({"group_size": 64} if scheme in ("W4A16", "W2A16") else {}))
    assert all(isinstance(m, CompressedLinear) and m.kernel is not None for m in fast.modules() if hasattr(m, "kernel"))
    batches = [{"input_ids": torch.randint(3, 320, (4, 64))} for _ in range(4)]
    found = evaluate_model(fast, batches, baseline=plain, metrics=("kl_divergence",))
    assert found["model"]["kl_divergence"]["value"] < 1e-3


@pytest.mark.parametrize(("scheme", "mode"), [("W4A16", "default"), ("W4A16", "reduce-overhead"), ("W8A8", "default")])
def test_a_decode_step_compiles_to_one_graph_and_says_the_same(scheme, mode):
    torch.compiler.reset()
    model, _ = rounded(scheme)
    prompt = torch.randint(3, 320, (1, 7), device="cuda")

    def decode(run: Any) -> list[torch.Tensor]:
        cache = StaticCache(config=model.config, max_cache_len=32)
        logits = []
        with torch.no_grad():
            step = model(prompt, past_key_values=cache, use_cache=True).logits[:, -1:]
            for token in (5, 9, 300, 17, 4, 8):
                ids = torch.tensor([[token]], device="cuda")
                step = run(ids, past_key_values=cache, use_cache=True).logits[:, -1:].clone()
                logits.append(step)
        return logits

    wanted = decode(model)
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    for found, near in zip(decode(compiled), wanted, strict=True):
        # Fused, a dense model in bfloat16 is rounded otherwise too: by 1.4% of this one's logits on a CPU.
        assert (found - near).norm() < 0.06 * near.norm()


@pytest.mark.parametrize("scheme", ["W4A16", "FP8A16"])
def test_generate_compiles_with_graphs(scheme):
    torch.compiler.reset()
    model, _ = rounded(scheme)
    prompt = torch.randint(3, 320, (1, 7), device="cuda")
    options: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(prompt, cache_implementation="static", disable_compile=True, **options)
    config = CompileConfig(fullgraph=True, mode="reduce-overhead")
    found = model.generate(prompt, cache_implementation="static", compile_config=config, **options)
    assert found.shape == wanted.shape
    assert (found[0, :9] == wanted[0, :9]).all()  # later ones may differ where two tokens are nearly as likely


def test_a_weight_is_held_once():
    for scheme in (Scheme(4, True, "group", 64), Scheme(8, True, "channel", None), FP8, W8A8):
        plain, fast = optimized(scheme, 576, 1536, device="cuda")
        held = sum(t.numel() * t.element_size() for t in fast.buffers())
        assert held <= 1.15 * sum(t.numel() * t.element_size() for t in plain.buffers())


@pytest.mark.parametrize(
    "steps",
    [
        [{"quantize": {"method": "gptq", "scheme": "W4A16", "group_size": 64}}],
        [{"quantize": {"method": "gptq", "scheme": "W3A16", "group_size": 64, "tune": {"steps": 4, "rounding": True}}}],
        [{"prune": {"what": "width", "method": "obs", "ratio": 0.2}}, {"quantize": {"method": "gptq"}}],
        [{"prune": {"what": "depth", "method": "kl_greedy", "blocks": 1}}],
        [{"prune": {"what": "depth", "method": "evolve", "blocks": 1, "generations": 2}}],
        [{"prune": {"what": "weights", "method": "sparsegpt", "pattern": "2:4"}}],
    ],
    ids=["gptq", "tuned", "width", "greedy", "evolve", "sparse"],
)
def test_compression_runs_where_the_model_is(steps):
    model = small_llama()
    batches = [{"input_ids": torch.randint(3, 320, (2, 48))} for _ in range(8)]
    dense = copy.deepcopy(model)
    shrink(model, {"steps": steps}, calibration=batches, progress=False)
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"cuda"}
    found = evaluate_model(model, batches, baseline=dense, metrics=("kl_divergence",))
    assert 0 <= found["model"]["kl_divergence"]["value"] < 10
    assert kernel_summary(model) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_folder_is_worked_on_whole_and_block_by_block(dtype, tmp_path, monkeypatch):
    source = tmp_path / "source"
    small_llama().cpu().to(dtype).save_pretrained(source)
    batches = [{"input_ids": torch.randint(3, 320, (2, 48))} for _ in range(8)]
    steps = [{"prune": {"what": "width", "method": "obs", "ratio": 0.2}}, {"quantize": {"method": "gptq"}}]
    recipe = {"steps": steps, "evaluation": {"metrics": []}}
    monkeypatch.setattr(Residence, "needed_to_visit", lambda self: 0)
    for name, free in (("whole", 10**12), ("visited", 0)):
        monkeypatch.setattr(devices, "free_on", lambda device, free=free: free)
        report = shrink_checkpoint(source, tmp_path / name, recipe, calibration=batches, progress=False)
        assert report.machine["device"].startswith("cuda")
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "visited"))
    assert one == other


def test_a_linear_that_no_kernel_takes_is_right_anyway():
    plain = linear_of(Scheme(4, True, "group", 16))
    fast = copy.deepcopy(plain).cuda()
    fast.optimize()
    assert fast.kernel is None and "32" in fast.kernel_note
    input = torch.randn(3, 1536)
    close(fast(input.cuda()), expected(plain, input))
