"""Attentions and MLPs taken out in a run with other steps: as planned, saved, loaded, and generating with a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCABULARY, tiny_llama
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hf_shrink import make_plan, shrink
from hf_shrink.architectures import bind
from hf_shrink.checkpoint.quantizers import register
from hf_shrink.plan import Plan

DEPTH = {"prune": {"what": "depth", "method": "kl_greedy", "parts": "any", "ratio": 0.3}}
WIDTH = {"prune": {"what": "width", "method": "wanda", "ratio": 0.1}}
QUANTIZE = {"quantize": {"method": "rtn", "scheme": "W8A16", "group_size": 16}}


def data() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, VOCABULARY, (3, 20), generator=generator)}]


def with_idle_parts() -> LlamaForCausalLM:
    """Without the attentions of blocks 1 and 2 nothing changes."""
    model = tiny_llama()
    for block in (1, 2):
        model.model.layers[block].self_attn.o_proj.weight.data.zero_()
    return model


@pytest.mark.parametrize("steps", [[DEPTH], [DEPTH, WIDTH, QUANTIZE]], ids=["alone", "width w8"])
def test_parts_go_with_other_steps(steps: list[dict[str, Any]], tmp_path: Path) -> None:
    register()
    recipe = {"portable": False, "steps": steps}
    plan = make_plan(with_idle_parts(), recipe, calibration=data(), progress=False)
    removed = {i: block.removed for i, block in plan.stacks["decoder"].blocks.items() if block.removed}
    assert removed[1] == removed[2] == ("attention",) and Plan.from_json(plan.to_json()) == plan
    assert "without its" in plan.summary()
    model = shrink(with_idle_parts(), recipe, calibration=data(), progress=False)
    assert not model.shrink_report.portable
    blocks = dict(zip(plan.stacks["decoder"].kept, bind(model).stacks[0].blocks, strict=True))
    for index, parts in removed.items():
        assert all(getattr(blocks[index], part) is None for part in parts)
    size = sum(p.numel() for p in tiny_llama().model.layers.parameters())
    if steps == [DEPTH]:
        left = sum(p.numel() for p in model.model.layers.parameters())
        assert (size - left) / size == pytest.approx(0.3, abs=0.05)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = data()[0]["input_ids"]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        settings = {
            "do_sample": False,
            "max_new_tokens": 5,
            "min_new_tokens": 5,
            "attention_mask": torch.ones_like(ids),
        }
        cached = loaded.generate(ids, use_cache=True, **settings)
        assert torch.equal(cached, loaded.generate(ids, use_cache=False, **settings))
