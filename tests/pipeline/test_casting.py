"""Recipes with a `dtype`: what comes out is what transformers loads in that dtype, in memory as in files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.cases_mixtures import MORE
from tiny import tiny_llama
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_shrink import shrink, shrink_checkpoint
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
