"""Blocks without their attention or MLP: as if the part wrote zeros, with and without a KV cache, saved and loaded."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.cases import CASES as DECODERS
from conformance.cases_encoders import CASES as OTHERS
from conformance.references import assert_near, far_apart, outputs
from torch import nn
from transformers import PreTrainedModel

from hf_shrink.architectures import bind
from hf_shrink.architectures.bound import BoundMlp
from hf_shrink.architectures.linears import matrix
from hf_shrink.checkpoint.quantizers import register
from hf_shrink.checkpoint.save import bind as bind_save
from hf_shrink.checkpoint.save import model_portability
from hf_shrink.errors import ArchitectureError
from hf_shrink.plan import BlockPlan, Plan, StackPlan
from hf_shrink.surgery import apply_structure, is_uneven, settle_config

CACHED = (
    "llama",
    "qwen2",
    "gemma2",
    "smollm3",
    "phi3",
    "gpt2",
    "gpt_neox",
    "opt",
    "opt_post_norm",
    "falcon_per_head",
    "falcon_grouped",
    "bloom",
    "qwen2_vl",
)
TWO_STACKS = ("t5", "t5_gated", "bart", "whisper", "bert_decoder")
ENCODERS = ("bert_masked_lm", "distilbert_classifier", "modernbert_masked_lm", "vit", "clip")
# Of the first blocks of a cached stack only the MLP goes; Gemma 2 and Qwen2 have windows in blocks 0 and 3.
WISHES = {0: ("mlp",), 1: ("mlp",), 2: ("attention", "cross_attention"), 3: ("attention", "mlp")}


def case_of(name: str) -> Any:
    return DECODERS.get(name) or OTHERS[name]


def plan_for(model: PreTrainedModel) -> Plan:
    stacks = {}
    for stack in bind(model).stacks:
        plans = {}
        for block in stack.blocks:
            parts = [getattr(block, part) and part for part in WISHES[block.index]]
            fixed = block.attention.spec.whole is not None
            plans[block.index] = BlockPlan(removed=tuple(p for p in parts if p and not (fixed and p == "attention")))
        stacks[stack.name] = StackPlan(tuple(plans), plans)
    return Plan(model.config.model_type, stacks)


def writing_zeros(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    masked = copy.deepcopy(model)
    for stack in bind(masked).stacks:
        for block in stack.blocks:
            for name in plan.stacks[stack.name].blocks[block.index].removed:
                part = getattr(block, name)
                role = "down" if isinstance(part, BoundMlp) else "output"
                matrix(part.modules[part.slot(role).path]).zero_()
    return masked


def inputs_of(case: Any, model: nn.Module) -> dict[str, Any]:
    cached = getattr(model.config, "is_encoder_decoder", False) or getattr(model.config, "use_cache", None) is not None
    return case.inputs() | ({"use_cache": False} if cached and "pixel_values" not in case.inputs() else {})


@pytest.mark.parametrize("name", CACHED + TWO_STACKS + ENCODERS)
def test_blocks_work_without_parts_and_come_back_from_a_file(name: str, tmp_path: Path) -> None:
    case = case_of(name)
    model = case.build()
    inputs, plan = inputs_of(case, model), plan_for(model)
    with torch.no_grad():
        before, expected = outputs(model, inputs), outputs(writing_zeros(model, plan), inputs)
        size = model.num_parameters()
        apply_structure(model, plan)
    found = outputs(model, inputs)
    assert_near(found, expected)
    assert far_apart(found, before)
    assert model.num_parameters() < size
    assert is_uneven(model) and model_portability(model)
    assert all(not part for b in bind(model).blocks if b.index == 3 for part in (b.attention, b.mlp) if name != "bloom")

    register()
    bind_save(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert all(torch.equal(a, b) for a, b in zip(outputs(loaded, inputs), found, strict=True))
    assert loaded.config.hf_shrink == model.config.hf_shrink
    loaded.save_pretrained(tmp_path / "again")
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path, tmp_path / "again")]
    assert configs[0]["hf_shrink"] == configs[1]["hf_shrink"] and configs[0]["hf_shrink"]["absent"]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


@pytest.mark.parametrize("name", CACHED + TWO_STACKS)
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_decoding_with_a_cache_equals_the_full_forward(name: str) -> None:
    case = case_of(name)
    model = case.build()
    apply_structure(model, plan_for(model))
    inputs = case.inputs()
    key = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    ids = inputs.pop(key)
    with torch.no_grad():
        full = model(**inputs, **{key: ids}, use_cache=False).logits
        first = model(**inputs, **{key: ids[:, :6]}, use_cache=True)
        found = [first.logits]
        for position in range(6, ids.shape[1]):
            step = {key: ids[:, position : position + 1], "past_key_values": first.past_key_values}
            found.append(model(**inputs, **step, use_cache=True).logits)
    assert_near([torch.cat(found, dim=1)], [full])
    if key == "input_ids" and name != "bert_decoder":
        settings = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 2}
        mask = torch.ones_like(ids)
        cached = model.generate(ids, attention_mask=mask, use_cache=True, **settings)
        assert torch.equal(cached, model.generate(ids, attention_mask=mask, use_cache=False, **settings))


def removing(model: PreTrainedModel, **blocks: BlockPlan) -> Plan:
    plans = {int(name[1:]): plan for name, plan in blocks.items()}
    return Plan(model.config.model_type, {"decoder": StackPlan(tuple(range(4)), plans)})


@pytest.mark.parametrize(
    ("name", "plan", "message"),
    [
        ("llama", {"b0": BlockPlan(removed=("attention",))}, "first block"),
        ("bloom", {"b1": BlockPlan(removed=("attention",))}, "adds the residual stream"),
        ("llama", {"b1": BlockPlan(removed=("cross_attention",))}, "has none"),
        ("llama", {"b1": BlockPlan(removed=("mlp",), channels=(0, 1))}, "both cuts and removes the mlp"),
    ],
)
def test_what_a_block_cannot_do_without_stays(name: str, plan: dict[str, BlockPlan], message: str) -> None:
    model = case_of(name).build()
    with pytest.raises(ArchitectureError, match=message):
        apply_structure(model, removing(model, **plan))


def test_a_bare_model_loads_from_a_checkpoint_with_a_head(tmp_path: Path) -> None:
    from transformers import AutoModel

    register()
    model = case_of("llama").build()
    apply_structure(model, removing(model, b1=BlockPlan(removed=("attention",)), b2=BlockPlan(removed=("mlp",))))
    settle_config(model)
    bind_save(model)
    model.save_pretrained(tmp_path)
    ids = case_of("llama").inputs()["input_ids"]
    with torch.no_grad():
        bare = AutoModel.from_pretrained(tmp_path)(ids).last_hidden_state
        assert torch.equal(model.lm_head(bare), model(ids).logits)
