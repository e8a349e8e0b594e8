"""`torch.compile` of optimized models: a decode step with a static cache is one graph, and says the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import tiny_llama
from transformers import CompileConfig, StaticCache

from hf_shrink import kernel_summary, optimize_for_inference, shrink
from hf_shrink.runtime.int8 import int8_linear
from hf_shrink.runtime.kernels.blocks import blockwise_linear


def optimized(head: Any, scheme: str = "W4A16") -> Any:
    torch.manual_seed(0)
    dense = tiny_llama(
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        tie_word_embeddings=True,
    )
    quantize = {"method": "rtn", "scheme": scheme, "group_size": 32, "head": head}
    recipe = {"portable": False, "steps": [{"quantize": quantize}]}
    return optimize_for_inference(shrink(dense.to(torch.bfloat16), recipe, progress=False))


def decode(model: Any, run: Any, prompt: torch.Tensor, tokens: int) -> tuple[list[int], list[torch.Tensor]]:
    """Greedy decoding with a static cache: `run` makes every step but the first."""
    cache = StaticCache(config=model.config, max_cache_len=32)
    chosen, logits = [], []
    with torch.no_grad():
        step = model(prompt, past_key_values=cache, use_cache=True).logits[:, -1:]
        for _ in range(tokens):
            chosen.append(int(step.argmax()))
            step = run(torch.tensor([[chosen[-1]]]), past_key_values=cache, use_cache=True).logits[:, -1:]
            logits.append(step)
    return chosen, logits


@pytest.mark.parametrize(("head", "scheme"), [("W8A16", "W4A16"), ("W4A16", "W2A16"), ("W8A16", "W8A16")])
def test_a_decode_step_is_one_graph_and_says_the_same(head: str, scheme: str) -> None:
    torch.compiler.reset()
    model = optimized(head, scheme)
    assert all(name.startswith("int") for name in kernel_summary(model))
    prompt = torch.randint(3, 320, (1, 7))
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend=backend)
    chosen, logits = decode(model, model, prompt, 6)
    found, near = decode(model, compiled, prompt, 6)
    assert len(graphs) == 1  # no break, and not traced again for the next token
    assert found == chosen
    assert all(map(torch.equal, near, logits))


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [True, False])
def test_rounded_inputs_are_scaled_alike_where_a_compiler_fuses_them(symmetric: bool) -> None:
    """inductor has patterns of its own for int8 products."""
    torch.compiler.reset()
    weight = torch.randint(-128, 128, (48, 64), dtype=torch.int8)
    scale, bias = torch.rand(48) / 100, torch.randn(48)

    def linear(input: torch.Tensor) -> torch.Tensor:
        return int8_linear(input, weight, scale, bias, symmetric=symmetric)

    compiled = torch.compile(linear, fullgraph=True)
    for shape in ((1, 1, 64), (2, 7, 64)):
        input = torch.randn(shape)
        torch.testing.assert_close(compiled(input), linear(input))


def test_weights_are_unpacked_in_a_graph() -> None:
    """As prompts of many tokens are multiplied."""
    torch.compiler.reset()
    kernel = optimized("W8A16").model.layers[0].mlp.up_proj.kernel
    input = torch.randn(3, 64)
    compiled = torch.compile(lambda x: blockwise_linear(kernel, x, None), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input), blockwise_linear(kernel, input, None), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_generate_compiles_with_a_static_cache() -> None:
    torch.compiler.reset()
    model = optimized("W8A16")
    prompt = torch.randint(3, 320, (1, 7))
    options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(prompt, cache_implementation="static", **options)
    config = CompileConfig(fullgraph=True, mode="default")
    config._compile_all_devices = True  # transformers compiles on accelerators only, unless told so
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    found = model.generate(prompt, cache_implementation="static", compile_config=config, **options)
    assert torch.equal(found, wanted)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before
