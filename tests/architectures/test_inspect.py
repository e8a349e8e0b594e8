"""describe(): sizes, and what can be removed, from shapes alone."""

from __future__ import annotations

import pytest
import torch
from conformance.cases import CASES
from tiny import tiny_unknown

from hf_shrink.architectures.inspect import Heads, describe
from hf_shrink.plan import BlockPlan, Plan, StackPlan
from hf_shrink.surgery import apply_structure, build_skeleton, is_uneven


@pytest.mark.parametrize("name", ["llama_tied", "gemma3", "gpt2", "falcon_grouped", "bloom"])
def test_a_model_on_the_meta_device_is_described_as_the_real_one(name: str) -> None:
    model = CASES[name].build()
    description = describe(model)
    assert describe(build_skeleton(model)) == description
    assert description.parameters == sum(p.numel() for p in model.parameters())
    assert description.bytes == 4 * description.parameters
    rows = description.rows()
    # Lines of matrices inside blocks are indented: the others add up to the whole.
    assert sum(row[2] for row in rows[:-1] if not row[0].startswith(" ")) == rows[-1][2] == description.parameters
    assert sum(row[3] for row in rows[:-1] if not row[0].startswith(" ")) == rows[-1][3] == description.bytes


def test_bytes_follow_the_dtype() -> None:
    model = CASES["llama"].build()
    full = describe(model).bytes
    assert describe(model.to(torch.bfloat16)).bytes * 2 == full


def test_what_a_grouped_decoder_can_lose() -> None:
    stack = describe(CASES["llama"].build()).stacks[0]
    assert stack.blocks[0].heads == Heads(3, 2, 10) and stack.blocks[0].channels == 80
    # Stock wants 48 to be a multiple of the heads, which 1, 2, 3, 4 and 6 all allow.
    assert stack.portable_heads == ((3, 2), (3, 1), (2, 2), (2, 1), (1, 2), (1, 1))
    assert stack.portable_channels and stack.heads_fixed is None and not stack.first_stays


def test_heads_that_do_not_divide_the_width_are_not_portable_where_stock_refuses_them() -> None:
    model = CASES["llama_multi_query"].build()
    assert describe(model).stacks[0].portable_heads == ((1, 6), (1, 4), (1, 3), (1, 2), (1, 1))
    for kept, uneven in (5, True), (4, False):
        cut = CASES["llama_multi_query"].build()
        blocks = {i: BlockPlan(query_heads=tuple(range(kept))) for i in range(4)}
        apply_structure(cut, Plan("llama", {"decoder": StackPlan((0, 1, 2, 3), blocks)}))
        assert is_uneven(cut) == uneven


def test_what_the_other_decoders_can_lose() -> None:
    assert describe(CASES["gpt2"].build()).stacks[0].portable_heads == ((6, 1),)
    bloom = describe(CASES["bloom"].build()).stacks[0]
    assert not bloom.portable_channels and "ALiBi" in (bloom.heads_fixed or "")
    assert "no heads can be removed: each head has its own ALiBi slope" in describe(CASES["bloom"].build()).to_text()


def test_the_text_names_roles_and_shapes() -> None:
    text = describe(CASES["phi3"].build()).to_text()
    assert "blocks 0-3" in text and "self_attn.qkv_proj (query, key, value)" in text and "96 x 48" in text
    assert "3 KV groups of 2 query heads of 8, 80 channels" in text
    tied = describe(CASES["llama_tied"].build())
    assert tied.outside[-1].path == "lm_head" and tied.outside[-1].parameters == 0
    assert "300 x 48, tied" in tied.to_text()


def test_blocks_of_other_sizes_get_lines_of_their_own() -> None:
    model = CASES["llama"].build()
    apply_structure(model, Plan("llama", {"decoder": StackPlan((0, 1, 2, 3), {1: BlockPlan(channels=(0, 1, 2))})}))
    parts = [row[0] for row in describe(model).rows()]
    assert {"decoder block 0", "decoder block 1", "decoder blocks 2-3"} <= set(parts)


def test_a_model_type_without_roles_is_for_quantization_only() -> None:
    description = describe(tiny_unknown())
    assert not description.prunable and len(description.stacks[0].blocks[0].matrices) == 7
    assert "quantized, not pruned" in description.to_text()
