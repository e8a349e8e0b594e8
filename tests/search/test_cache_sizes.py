"""What a budget takes a token of the KV cache for, against the cache that the model writes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conformance.cases import CASES, tokens
from conformance.cases_mixtures import MIXTURES
from transformers import (
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    MiniCPM3Config,
    MiniCPM3ForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_shrink import ArchitectureError, shrink
from hf_shrink.pipeline.planning import experts_apart
from hf_shrink.pipeline.searching import Searching
from hf_shrink.plan import Plan
from hf_shrink.progress import quiet
from hf_shrink.recipe import Recipe
from hf_shrink.search.blank import blank_sensitivity
from hf_shrink.search.measuring import Space
from hf_shrink.search.options import Problem
from hf_shrink.search.problem import make_problem

TOKENS = 3  # as many as the smallest window keeps
TABLE = ["llama", "llama_multi_query", "qwen3", "gemma2", "phi3", "gpt2", "opt", "bloom"]
FALCONS = ["falcon_multi_query", "falcon_per_head", "falcon_grouped", "falcon_alibi"]
BUILDS: dict[str, Callable[[], PreTrainedModel]] = {
    **{name: CASES[name].build for name in (*TABLE, *FALCONS)},
    **{name: MIXTURES[name] for name in ("mixtral", "qwen3_moe")},
    # Bound by convention; all query heads share one key and value.
    "gpt_bigcode": lambda: GPTBigCodeForCausalLM(
        GPTBigCodeConfig(vocab_size=64, n_positions=32, n_embd=48, n_layer=2, n_head=6, multi_query=True)
    ).eval(),
}


def problem_of(model: PreTrainedModel) -> Problem:
    space, base = Space((), portable=False, depth=False, embeddings=False), Plan(model.config.model_type, refit=False)
    with experts_apart(model) as binding:
        assert binding is not None
        return make_problem(model, binding, space, blank_sensitivity(model, binding, space, ()), (), base)


def written(model: PreTrainedModel) -> float:
    """Bytes a token of the cache."""
    with torch.no_grad():
        cache = model(tokens(1, TOKENS) % model.config.get_text_config().vocab_size, use_cache=True).past_key_values
    return sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values)) / TOKENS


@pytest.mark.parametrize("name", BUILDS)
def test_a_token_of_the_cache_is_counted_as_it_is_written(name: str) -> None:
    model = BUILDS[name]()
    assert problem_of(model).dense.cache == written(model)


@pytest.mark.parametrize("name", ["llama", *FALCONS[:3]])
def test_and_with_fewer_heads(name: str) -> None:
    model = BUILDS[name]()
    problem = problem_of(model)
    choice = [
        next((i for i, option in enumerate(group.options) if option.change.block.query_heads is not None), 0)
        for group in problem.groups
    ]
    shrink(model, problem.plan(choice), progress=False)
    predicted = problem.cost(choice).cache
    assert predicted == written(model)
    # One key and value for all query heads stay as they are.
    assert (predicted < problem.dense.cache) == (name != "falcon_multi_query")


def test_of_two_stacks_only_the_decoders_own_cache_is_counted() -> None:
    sizes = {"d_model": 48, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 3, "vocab_size": 64}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    ids = tokens(1, TOKENS) % 64
    with torch.no_grad():
        cache = model(input_ids=ids, decoder_input_ids=ids, use_cache=True).past_key_values.self_attention_cache
    own = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values)) / TOKENS
    assert problem_of(model).dense.cache == own


def test_memory_is_not_limited_where_nothing_is_known_of_the_cache() -> None:
    """Of attentions that keep a latent in place of keys and values."""
    sizes = {"vocab_size": 64, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 3, "v_head_dim": 16, "qk_nope_head_dim": 8}
    config = MiniCPM3Config(**sizes, **heads, qk_rope_head_dim=8, q_lora_rank=16, kv_lora_rank=8)
    search = {"bits": [4], "width": False, "depth": False, "group_size": 8}
    asked = Recipe.from_dict({"budget": {"memory": "60%"}, "search": search})
    assert asked.budget is not None
    model, match = MiniCPM3ForCausalLM(config).eval(), "what its cache takes is not known; give a budget in bytes"
    with Searching.on(model, asked, (), 0, quiet) as searching, pytest.raises(ArchitectureError, match=match):
        searching.check(asked.budget)
