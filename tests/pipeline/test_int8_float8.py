"""W8A8 and FP8A16 end to end: several families with real statistics, mixed with W4A16, saved and loaded."""

from __future__ import annotations

import copy
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils.helpers import compute_dynamic_scales_and_zp
from pipeline.test_families import EVERY, outputs, reload
from pipeline.test_stages import model_in_stages
from tiny import QUICK_GPTQ, tiny_llama
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from hf_shrink import Plan, make_plan, shrink
from hf_shrink.errors import RecipeError
from hf_shrink.plan import Scheme
from hf_shrink.reporting.card import model_card
from hf_shrink.runtime import CompressedLinear

FAMILIES = ("llama", "qwen2", "gpt2", "opt", "bert", "t5", "vit")
IDS = {"input_ids": torch.arange(5, 37).view(2, 16)}


@pytest.mark.parametrize("scheme", ["W8A8", "FP8A16"])
@pytest.mark.parametrize(("name", "first"), list(zip(FAMILIES, cycle(["rtn", "gptq"]))), ids=FAMILIES)
def test_families(name: str, first: str, scheme: str, tmp_path: Path) -> None:
    method = first if scheme == "W8A8" else {"rtn": "gptq", "gptq": "rtn"}[first]  # every pair of two, not all three
    build, make_inputs = EVERY[name]
    dense, inputs = build(), make_inputs()
    step = {"quantize": {**(QUICK_GPTQ if method == "gptq" else {"method": method}), "scheme": scheme}}
    model: Any = shrink(
        copy.deepcopy(dense), {"portable": False, "steps": [step]}, calibration=[inputs] * 2, progress=False
    )
    packed = [m for m in model.modules() if isinstance(m, CompressedLinear)]
    assert packed and {m.scheme.name for m in packed} == {scheme}
    before, after = outputs(dense, inputs), outputs(model, inputs)
    assert 0 < float((after - before).norm() / before.norm()) < 0.25
    torch.testing.assert_close(outputs(reload(model, tmp_path), inputs), after, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "concerned"),
    [("llama", None), ("bert", None), ("opt", "layers.0.fc1 and 7 more"), ("convnext", "pwconv1")],
)
def test_inputs_that_stock_rounds_with_one_scale_for_many_tokens_are_named(name: str, concerned: str | None) -> None:
    model: Any = model_in_stages(name) if name == "convnext" else EVERY[name][0]()
    quantize = {"method": "rtn", "scheme": "W8A8"}
    report = shrink(copy.deepcopy(model), {"steps": [{"quantize": quantize}]}, progress=False).shrink_report
    notes = [note for note in report.notes if "one scale for many tokens" in note]
    assert report.portable and len(notes) == (concerned is not None)
    assert concerned is None or concerned in notes[0]
    shrink(model, {"portable": False, "steps": [{"quantize": {**quantize, "scheme": "W8A16"}}]}, progress=False)
    assert not any("one scale" in note for note in model.shrink_report.notes)


def test_stock_takes_scales_for_the_first_two_dimensions_of_an_input() -> None:
    args = QuantizationArgs(num_bits=8, symmetric=False, strategy="token", dynamic=True)
    for shape, scales in (((2, 5, 8), 10), ((10, 8), 1), ((2, 3, 4, 8), 6)):
        scale, _ = compute_dynamic_scales_and_zp(torch.randn(shape), args, torch.nn.Linear(8, 8))
        assert scale.numel() == scales


def test_mixed_with_w4a16_in_bfloat16(tmp_path: Path) -> None:
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path / "dense")  # a cast in place would round rotary buffers
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    step = {"scheme": "W4A16", "group_size": 16, "overrides": {"re:.*down_proj": {"scheme": "W8A8"}}, **QUICK_GPTQ}
    shrink(model, {"steps": [{"quantize": step}]}, calibration=[IDS], progress=False)
    assert model.shrink_report.portable
    schemes = model.shrink_record.plan.schemes
    assert {path: scheme.name for path, scheme in schemes.items() if "layers.0" in path} == {
        f"model.layers.0.{name}": "W8A8" if "down" in name else "W4A16"
        for name in [*(f"self_attn.{r}_proj" for r in "qkvo"), *(f"mlp.{r}_proj" for r in ("gate", "up", "down"))]
    }
    after = outputs(model, IDS)
    assert torch.equal(outputs(reload(model, tmp_path), IDS), after)
    card = model_card(model.shrink_record)
    assert "- w8a8" in card and "inputs in int8 per token" in card


def test_embeddings_take_float8_but_no_int8_inputs(tmp_path: Path) -> None:
    everything = {"method": "rtn", "targets": ["Linear", "Embedding"], "ignore": []}
    model: Any = tiny_llama(tie_word_embeddings=True)
    with pytest.raises(RecipeError, match=r"embed_tokens is an embedding.*W8A16 or FP8A16"):
        make_plan(model, {"steps": [{"quantize": {**everything, "scheme": "W8A8"}}]}, progress=False)
    plan = Plan("llama", schemes={"model.embed_tokens": Scheme(8, True, "channel", None, "int", 8)}, method="rtn")
    with pytest.raises(RecipeError, match="is an embedding"):
        shrink(model, plan, progress=False)
    shrink(model, {"steps": [{"quantize": {**everything, "scheme": "FP8A16"}}]}, progress=False)
    assert model.shrink_report.portable
    assert model.lm_head.weight_packed.data_ptr() == model.model.embed_tokens.weight_packed.data_ptr()
    assert torch.equal(outputs(reload(model, tmp_path), IDS), outputs(model, IDS))


def test_one_seed_gives_one_checkpoint(tmp_path: Path) -> None:
    for name in ("w8a8", "fp8"):
        found = []
        for turn in "ab":
            model: Any = shrink(tiny_llama(num_hidden_layers=1), name, calibration=[IDS], progress=False)
            model.save_pretrained(tmp_path / turn)
            found.append((tmp_path / turn / "model.safetensors").read_bytes())
        assert found[0] == found[1]


@pytest.mark.parametrize(("scheme", "least"), [("W8A8", 0.995), ("FP8A16", 0.998)])
def test_sentence_embeddings_stay_near(scheme: str, least: float, minilm_dir: Path) -> None:
    dense: Any = AutoModel.from_pretrained(minilm_dir).eval()
    tokens = AutoTokenizer.from_pretrained(minilm_dir)(
        ["The tide goes out and leaves the sand in ridges.", "Nobody on the shore can say how many stones there are."]
        * 2,
        return_tensors="pt",
        padding=True,
    )

    def embeddings(model: Any) -> torch.Tensor:
        with torch.no_grad():
            hidden = model(**tokens).last_hidden_state * tokens["attention_mask"][..., None]
        return torch.nn.functional.normalize(hidden.sum(1), dim=-1)

    before = embeddings(dense)
    shrink(dense, {"steps": [{"quantize": {"method": "rtn", "scheme": scheme}}]}, progress=False)
    cosine = (before * embeddings(dense)).sum(-1)
    assert least < float(cosine.mean()) < 1 - 1e-5
