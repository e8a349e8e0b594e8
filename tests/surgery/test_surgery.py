"""Cutting blocks: what is refused, what the config says afterwards, what an uneven record holds."""

from __future__ import annotations

import copy

import pytest
import torch
from conformance.cases import CASES
from tiny import tiny_llama
from transformers import Phi3Config, Phi3ForCausalLM

from hf_shrink.architectures import bind
from hf_shrink.errors import ArchitectureError
from hf_shrink.plan import BlockPlan, Plan, StackPlan
from hf_shrink.surgery import (
    apply_structure,
    build_skeleton,
    is_uneven,
    module_shape,
    remove_blocks,
    resize_skeleton,
    settle_config,
    without_blocks,
)

EVERY = (0, 1, 2, 3)


def plan(kept: tuple[int, ...] = EVERY, model_type: str = "llama", **blocks: BlockPlan) -> Plan:
    return Plan(model_type, {"decoder": StackPlan(kept, {int(name[1:]): block for name, block in blocks.items()})})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (plan(model_type="mistral"), "made for a 'mistral' model"),
        (Plan("llama", {"encoder": StackPlan((0,))}), "no stack 'encoder'"),
        (plan(()), "nothing would be left of its blocks"),
        (plan((0, 4)), "ascending whole numbers below 4"),
        (plan((1, 0)), "ascending"),
        (plan((0, 1), b2=BlockPlan(channels=(0,))), "units of blocks that it removes"),
        (plan(b0=BlockPlan(channels=())), "nothing would be left of its channels"),
        (plan(b0=BlockPlan(channels=(3, 3))), "each once"),
        (plan(b0=BlockPlan(channels=(80,))), "below 80"),
        (plan(b0=BlockPlan(query_heads=())), "nothing would be left of its query heads"),
        (plan(b0=BlockPlan(query_heads=(0, 1, 2))), "same number of query heads"),
        (plan(b0=BlockPlan(cross_heads=(0,))), "no such attention"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(wrong: Plan, message: str) -> None:
    with pytest.raises(ArchitectureError, match=message):
        apply_structure(tiny_llama(), wrong)


def test_removed_blocks_are_renumbered_and_lists_sliced() -> None:
    model = CASES["smollm3"].build()
    apply_structure(model, plan((0, 1, 3), model_type="smollm3"))
    assert [block.self_attn.layer_idx for block in model.model.layers] == [0, 1, 2]
    assert model.config.num_hidden_layers == 3 and model.config.no_rope_layers == [1, 0, 0]
    assert len(model.config.layer_types) == 3


def test_the_first_block_stays_where_it_is_built_differently() -> None:
    from conformance.cases_encoders import CASES as ENCODERS

    model = ENCODERS["modernbert_masked_lm"].build()
    with pytest.raises(ArchitectureError, match="first block"):
        remove_blocks(model, bind(model).stacks[0], (1, 2))


def test_without_blocks_puts_everything_back_after_an_error() -> None:
    model = tiny_llama()
    layers = model.model.layers
    with pytest.raises(KeyError), without_blocks(model, bind(model).stacks[0], [1]):
        assert len(model.model.layers) == 3 and model.config.num_hidden_layers == 3
        raise KeyError
    assert model.model.layers is layers and model.config.num_hidden_layers == 4


def test_uniform_sizes_go_into_stock_keys() -> None:
    model = CASES["qwen2"].build()  # its config has no head size until heads are removed
    assert getattr(model.config, "head_dim", None) is None
    blocks = {f"b{i}": BlockPlan((0, 1, 4, 5), tuple(range(i, 40 + i))) for i in EVERY}
    apply_structure(model, plan(model_type="qwen2", **blocks))
    config = model.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 8)
    assert config.intermediate_size == 40 and not is_uneven(model)


def test_one_part_may_be_uniform_where_the_other_is_not() -> None:
    model = tiny_llama()
    blocks = {f"b{i}": BlockPlan((0, 1) if i else None, tuple(range(40))) for i in EVERY}
    apply_structure(model, plan(**blocks))
    assert model.config.intermediate_size == 40 and model.config.num_attention_heads == 6
    shapes = model.config.hf_shrink["shapes"]
    assert shapes["model.layers.1.self_attn.q_proj"] == [32, 48] and not any("mlp" in path for path in shapes)


def test_the_same_heads_in_other_groups_are_uneven() -> None:
    """Two heads everywhere, of one group or of two: the number of heads alone must not go into the config."""
    model = tiny_llama()
    blocks = {f"b{i}": BlockPlan((0, 1) if i % 2 else (0, 2)) for i in EVERY}
    apply_structure(model, plan(**blocks))
    assert is_uneven(model) and model.config.num_attention_heads == 6 and model.config.num_key_value_heads == 3


def test_modules_that_read_their_config_share_it_again_when_uniform() -> None:
    model = CASES["phi3"].build()
    apply_structure(model, plan(model_type="phi3", **{f"b{i}": BlockPlan((0, 1, 4, 5)) for i in EVERY}))
    assert all(block.self_attn.config is model.config for block in model.model.layers)
    apply_structure(model, plan(model_type="phi3", b2=BlockPlan((0, 1))))
    heads = [block.self_attn.config.num_attention_heads for block in model.model.layers]
    assert heads == [4, 4, 2, 4] and model.config.num_attention_heads == 4
    assert model.config.hf_shrink["attributes"]["model.layers.2.self_attn"]["config.num_attention_heads"] == 2


def test_sizes_that_stock_validation_refuses_are_uneven() -> None:
    """The long and short factors of longrope are checked against hidden_size // heads, whatever the head size."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = Phi3Config(
        vocab_size=300, hidden_size=48, intermediate_size=80, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=3, pad_token_id=0, max_position_embeddings=64, original_max_position_embeddings=32,
        rope_parameters={**rope, "original_max_position_embeddings": 32},
    )  # fmt: skip
    model = Phi3ForCausalLM(config)
    apply_structure(model, plan(model_type="phi3", **{f"b{i}": BlockPlan((0, 1, 4, 5)) for i in EVERY}))
    assert is_uneven(model) and model.config.num_attention_heads == 6
    model.config.validate()


def test_surgery_can_be_repeated() -> None:
    model, at_once = tiny_llama(), tiny_llama()
    apply_structure(model, plan(b1=BlockPlan(channels=tuple(range(60)))))
    apply_structure(model, plan((0, 1, 3), b1=BlockPlan((0, 1), tuple(range(30)))))
    apply_structure(at_once, plan((0, 1, 3), b1=BlockPlan((0, 1), tuple(range(30)))))
    assert model.config.to_dict() == at_once.config.to_dict()
    ids = torch.arange(5, 15)[None]
    assert torch.equal(model(ids).logits, at_once(ids).logits)


def test_a_record_is_checked_before_it_is_used() -> None:
    model = tiny_llama()
    with pytest.raises(ArchitectureError, match="format 2"):
        resize_skeleton(model, {"format": 2})
    with pytest.raises(ArchitectureError, match="lacks"):
        resize_skeleton(model, {"format": 1, "shapes": {"model.layers.9.mlp.up_proj": [4, 4]}})
    with pytest.raises(ArchitectureError, match="lacks"):
        resize_skeleton(model, {"format": 1, "attributes": {"model.nothing": {"x": 1}}})


def test_a_skeleton_has_no_memory_and_the_shapes_of_the_model() -> None:
    model = tiny_llama()
    apply_structure(model, plan(b2=BlockPlan((0, 1), (1, 2, 3))))
    before = copy.deepcopy(model.config.to_dict())
    skeleton = build_skeleton(model)
    assert all(p.is_meta for p in skeleton.parameters())
    resize_skeleton(skeleton, model.config.hf_shrink)
    assert [module_shape(m) for m in skeleton.modules()] == [module_shape(m) for m in model.modules()]
    settle_config(model)
    assert model.config.to_dict() == before
