"""Binding: which rows and columns each unit owns, and what is said when a model does not fit."""

from __future__ import annotations

import pytest
import torch
from conformance.cases import CASES
from tiny import tiny_llama, tiny_unknown
from torch import nn

from hf_shrink.architectures import bind, known_families
from hf_shrink.architectures.linears import cut, matrix, shape
from hf_shrink.errors import ArchitectureError
from hf_shrink.plan import Plan, StackPlan
from hf_shrink.surgery import apply_structure


def test_an_unknown_family_can_be_quantized_but_not_pruned() -> None:
    model = tiny_unknown()
    binding = bind(model)
    assert binding.model_type not in known_families() and binding.family is None and binding.source is None
    assert [stack.path for stack in binding.stacks] == ["model.layers"]
    linears = {name for name, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in name}
    assert {path for block in binding.blocks for path in block.roles} == linears
    with pytest.raises(ArchitectureError, match=r"could not be found and verified .*nothing that it reads is known"):
        binding.require_roles()
    with pytest.raises(ArchitectureError, match="no role table"):
        apply_structure(model, Plan(binding.model_type, {"model.layers": StackPlan((0, 1))}))


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ArchitectureError, match="no repeated blocks"):
        bind(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))


def test_a_stack_that_is_not_there_is_named() -> None:
    with pytest.raises(ArchitectureError, match="no stack 'encoder'; it has decoder"):
        bind(tiny_llama()).stack("encoder")


@pytest.mark.parametrize(
    ("name", "query", "key", "value"),
    [
        # Rows of query head 3 and of its KV group, heads of size 8: 6 heads alone, 1 group, 3 groups of 2.
        ("gpt2", 24, 48 + 24, 96 + 24),
        ("gpt_neox", 3 * 24, 3 * 24 + 8, 3 * 24 + 16),
        ("falcon_multi_query", 24, 48, 56),
        ("falcon_grouped", 32 + 8, 32 + 16, 32 + 24),
        ("phi3", 24, 48 + 8, 72 + 8),
        ("qwen2", 24, 8, 8),
    ],
)
def test_rows_of_a_head(name: str, query: int, key: int, value: int) -> None:
    attention = bind(CASES[name].build()).blocks[0].attention
    assert attention is not None and attention.head_size == 8
    group = 3 // attention.heads_per_group
    assert attention.slot("query").positions([3]).tolist() == list(range(query, query + 8))
    assert attention.slot("key").positions([group]).tolist() == list(range(key, key + 8))
    assert attention.slot("value").positions([group]).tolist() == list(range(value, value + 8))
    assert attention.slot("output").positions([3]).tolist() == list(range(24, 32))


def test_a_plan_with_unequal_groups_is_refused() -> None:
    attention = bind(tiny_llama()).blocks[0].attention
    assert attention is not None
    assert attention.groups_of([0, 1, 4, 5]) == (0, 2)
    with pytest.raises(ArchitectureError, match="same number of query heads"):
        attention.groups_of([0, 1, 4])


def test_parameters_of_units_count_weights_and_biases() -> None:
    block = bind(CASES["llama"].build()).blocks[0]  # hidden 48, heads of 10, biases everywhere
    assert block.attention is not None and block.mlp is not None
    assert block.attention.head_parameters == 10 * 48 + 10 + 48 * 10
    assert block.attention.group_parameters == 2 * block.attention.head_parameters + 2 * (10 * 48 + 10)
    assert block.mlp.channel_parameters == 2 * (48 + 1) + 48


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "o_proj"])
def test_a_matrix_of_the_wrong_shape_is_refused(name: str) -> None:
    model = tiny_llama()
    attention = model.model.layers[1].self_attn
    setattr(attention, name, nn.Linear(48, 90) if name != "o_proj" else nn.Linear(90, 48))
    with pytest.raises(ArchitectureError, match=r"model\.layers\.1"):
        bind(model)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_cut_keeps_rows_and_columns_of_both_kinds_of_matrix(name: str) -> None:
    block = bind(CASES[name].build()).blocks[0]
    assert block.mlp is not None
    module = block.module.get_submodule(block.mlp.spec.up)
    weight, bias = matrix(module).clone(), module.bias.clone()
    rows, columns = torch.tensor([0, 5, 7]), torch.arange(0, 48, 2)
    cut(module, rows, columns)
    assert shape(module) == (3, 24)
    assert torch.equal(matrix(module), weight[rows][:, columns]) and torch.equal(module.bias, bias[rows])
    assert module(torch.ones(2, 24)).shape == (2, 3)
    assert torch.allclose(module(torch.ones(1, 24))[0], weight[rows][:, columns].sum(1) + bias[rows], atol=1e-5)


def test_depth_scaled_attention_keeps_its_blocks() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=300, n_embd=48, n_layer=3, n_head=6, scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ArchitectureError, match="scaled by the number of its block"):
        apply_structure(GPT2LMHeadModel(config), Plan("gpt2", {"decoder": StackPlan((0, 2))}))
