"""Recipes with a `dtype`: what comes out is what transformers loads in that dtype, in memory as in files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.cases_mixtures import MORE
from stock import Stock
from tiny import tiny_llama
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_shrink import RecipeError, make_plan, shrink, shrink_checkpoint
from hf_shrink.checkpoint.loaded_dtypes import loaded_dtypes
from hf_shrink.residence import cast

HALF = [torch.bfloat16, torch.float16]


def long_llama() -> PreTrainedModel:
    return tiny_llama(num_hidden_layers=2, max_position_embeddings=512)


def recipe(dtype: torch.dtype, group: int) -> dict[str, Any]:
    step = {"method": "rtn", "scheme": "W4A16", "group_size": group}
    name = str(dtype).removeprefix("torch.")
    return {"dtype": name, "steps": [{"quantize": step}], "evaluation": {"metrics": []}}


def dtypes(model: PreTrainedModel) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in (*model.named_parameters(), *model.named_buffers())}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("build", "group", "length"), [(long_llama, 16, 512), (MORE["glm4_moe"], 8, 64)])
def test_the_model_is_the_one_that_its_folder_loads(
    build: Any, group: int, length: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Positions, and what corrects a router's scores, stay in float32."""
    model = build()
    frequencies = model.model.rotary_emb.inv_freq.clone()
    shrink(model, recipe(dtype, group), progress=False)
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)  # and of its dtype
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.dtype == model.dtype == dtype and dtypes(model) == dtypes(again)
    ids = torch.randint(3, 300, (1, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)


def test_block_by_block_it_is_the_same(tmp_path: Path) -> None:
    model = MORE["glm4_moe"]()
    model.save_pretrained(tmp_path / "dense")
    asked = recipe(torch.bfloat16, 8)
    shrink_checkpoint(tmp_path / "dense", tmp_path / "streamed", asked, max_memory=0, progress=False)
    shrink(model, asked, progress=False).save_pretrained(tmp_path / "whole")
    streamed, whole = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("streamed", "whole"))
    assert streamed == whole


class Scaled(LlamaForCausalLM):
    """Makes one buffer in the dtype of the model, and one in float32."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.register_buffer("factors", torch.ones(3), persistent=False)
        self.register_buffer("exact", torch.ones(3, dtype=torch.float32), persistent=False)


def test_a_buffer_of_the_model_s_dtype_is_cast() -> None:
    model = Scaled(tiny_llama().config)
    exact = model.exact
    cast(model, torch.bfloat16, loaded_dtypes(model, torch.bfloat16))
    assert model.factors.dtype == torch.bfloat16 and model.exact is exact and exact.dtype == torch.float32
    plain = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    cast(plain, torch.bfloat16, loaded_dtypes(plain, torch.bfloat16))
    assert plain[1].running_mean.dtype == torch.bfloat16


def test_what_is_float32_in_a_half_precision_source_is_so_in_another_one() -> None:
    model = MORE["glm4_moe"]()
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    cast(rounded, torch.float16, loaded_dtypes(rounded, torch.float16))
    bias = rounded.model.layers[1].mlp.gate.e_score_correction_bias
    dense = model.model.layers[1].mlp.gate.e_score_correction_bias
    assert bias.dtype == torch.float32 and torch.equal(bias, dense.bfloat16().float())


@pytest.mark.parametrize(
    "step",
    [
        {"method": "rtn", "symmetric": False},
        {"method": "hqq"},
        {"method": "gptq"},
        {"method": "learned", "steps": 3},
        {"method": "rtn", "scheme": "W8A8"},
        {"method": "rtn", "scheme": "FP8A16"},
    ],
)
def test_a_float64_model_stays_one(step: dict[str, Any], tmp_path: Path, stock_process: Stock) -> None:
    model = tiny_llama(num_hidden_layers=2).double()
    by_channel = step.get("scheme") in ("W8A8", "FP8A16")
    step = step if by_channel else {**step, "scheme": "W4A16", "group_size": 16}
    ids = torch.randint(3, 300, (4, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        dense = model(ids).logits
    data = [{"input_ids": half} for half in ids.chunk(2)]
    shrink(model, {"steps": [{"quantize": step}]}, calibration=data, progress=False)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        ours, loaded = model(ids).logits, again(ids).logits
    assert ours.dtype == torch.float64 == loaded.dtype and torch.allclose(ours, loaded, rtol=1e-6, atol=1e-7)
    stored, read = ({name: t.dtype for name, t in m.state_dict().items()} for m in (model, again))
    assert stored == read
    assert 1e-4 < (ours - dense).norm() / dense.norm() < 0.3
    if step.get("scheme") != "W8A8":  # which stock rounds no inputs of
        found = stock_process.logits(tmp_path, "LlamaForCausalLM", ids.tolist())
        assert (found - ours).norm() < 1e-4 * ours.norm()


def test_float64_has_no_4_bits_of_bitsandbytes() -> None:
    step = {"steps": [{"quantize": {"method": "bitsandbytes", "scheme": "NF4"}}]}
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_attention_heads": 4}
    single = tiny_llama(**sizes, num_key_value_heads=2)
    plan = make_plan(single, step, progress=False)
    model = copy.deepcopy(single).double()
    for asked in (step, plan):
        with pytest.raises(RecipeError, match=r"is in float64, of which bitsandbytes makes no NF4; say dtype: float32"):
            shrink(model, asked, progress=False)
    shrink(model, {**step, "dtype": "float32"}, progress=False)
    assert model.dtype == torch.float32
