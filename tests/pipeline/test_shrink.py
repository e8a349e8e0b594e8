"""`shrink` and `make_plan` on tiny models: what changes, what does not, what is said."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import QUICK_GPTQ, TEXT, tiny_llama, tiny_tokenizer, tiny_unknown
from torch import nn
from transformers import LlamaForCausalLM

import hf_shrink
from hf_shrink import Plan, make_plan, shrink
from hf_shrink.errors import ArchitectureError, CalibrationError, CheckpointError, RecipeError
from hf_shrink.pipeline.recipes import built_in_recipes, load_recipe
from hf_shrink.recipe import Recipe
from hf_shrink.reporting.reproduce import command, no_command
from hf_shrink.runtime.embedding import CompressedEmbedding
from hf_shrink.runtime.linear import CompressedLinear

GPTQ = {"steps": [{"quantize": {**QUICK_GPTQ, "scheme": "W4A16", "group_size": 16}}]}
PRUNE = {"steps": [{"prune": {"what": "width", "method": "wanda", "ratio": 0.3}}]}
SMALL = {"samples": 8, "length": 24, "batch_size": 4}


def data(batches: int = 3, seed: int = 7) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, 300, (4, 24), generator=generator)} for _ in range(batches)]


def two_blocks(**changes: Any) -> LlamaForCausalLM:
    return tiny_llama(num_hidden_layers=2, **changes)


def error(model: nn.Module, dense: nn.Module) -> float:
    x = data(1, seed=99)[0]["input_ids"]
    with torch.no_grad():
        difference = model(x).logits - dense(x).logits
        return float(difference.square().mean() / dense(x).logits.square().mean())


@pytest.mark.parametrize("name", sorted(built_in_recipes()))
def test_every_built_in_recipe_runs_on_its_own_text(name: str, tmp_path: Path) -> None:
    # bitsandbytes' 4 bits need inputs in multiples of 64
    wide = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    dense = two_blocks(tie_word_embeddings=name == "w8-full", **(wide if name == "nf4" else {}))
    recipe = load_recipe(name).with_overrides([f"calibration.{key}={value}" for key, value in SMALL.items()])
    if name.startswith("budget-bytes"):  # embeddings, which stay, are most of this model
        recipe = recipe.with_overrides(["budget.bytes=80%", "search.generations=1"])
    if name == "prune-depth":  # a tenth of two blocks is none
        recipe = recipe.with_overrides(["prune.blocks=1"])
    model = shrink(copy.deepcopy(dense), recipe, tokenizer=tiny_tokenizer(), progress=False)
    report = model.shrink_report
    if recipe.prune("weights"):
        assert report.bytes_after == report.bytes_before  # zeros are stored like any other weight
    else:
        assert report.bytes_after < report.bytes_before
    assert report.portable or not recipe.portable
    assert torch.isfinite(torch.tensor(error(model, dense)))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    x = data(1)[0]["input_ids"]
    with torch.no_grad():
        if name == "nf4":  # a CPU with AVX512-BF16 computes the loaded model's products in bfloat16
            assert (again(x).logits - model(x).logits).norm() < 0.05 * model(x).logits.norm()
        else:
            assert torch.equal(again(x).logits, model(x).logits)
        assert model.generate(x[:1], max_new_tokens=3, do_sample=False).shape[1] == x.shape[1] + 3
    if "prune-" in name:
        assert report.parameters_after < report.parameters_before


def test_gptq_beats_rtn_and_more_bits_are_better() -> None:
    dense = two_blocks()
    errors = {}
    for method, bits in (("rtn", 4), ("gptq", 4), ("gptq", 8)):
        recipe = {"steps": [{"quantize": {"method": method, "scheme": f"W{bits}A16", "group_size": 16}}]}
        model = shrink(copy.deepcopy(dense), recipe, calibration=data(), progress=False)
        errors[method, bits] = error(model, dense)
    assert errors["gptq", 8] < errors["gptq", 4] < errors["rtn", 4]


def test_same_seed_same_bytes_and_the_model_stays_usable() -> None:
    states = []
    for _ in range(2):
        model = shrink(two_blocks(), {"steps": [{"quantize": {"group_size": 16}}]}, calibration=data(), progress=False)
        assert not model.training
        states.append(model.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_the_record_says_which_data_it_was(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text(TEXT)
    for recipe, calibration, said in (({**GPTQ, "calibration": SMALL}, str(path), "mine.txt"), ("w8-full", None, None)):
        model = shrink(two_blocks(), recipe, tokenizer=tiny_tokenizer(), calibration=calibration, progress=False)
        description = model.shrink_report.calibration.get("description")
        assert description is None if said is None else said in description
        if said is not None:
            assert Recipe.from_dict(model.shrink_record.recipe).calibration.data == str(path)


def test_data_that_was_handed_over_is_in_no_recipe() -> None:
    """A command that does the same again could not name it."""
    texts = [TEXT] * 4
    model = shrink(two_blocks(), {**GPTQ, "calibration": SMALL}, tokenizer=tiny_tokenizer(), calibration=texts)
    assert command(model.shrink_record) == "" and "a list of texts" in no_command(model.shrink_record)
    rtn = {"steps": [{"quantize": {"method": "rtn", "scheme": "W4A16", "group_size": 16}}]}
    model = shrink(two_blocks(), rtn, tokenizer=tiny_tokenizer(), calibration=texts)  # which reads no data
    assert command(model.shrink_record).startswith("hf-shrink run")
    assert model.shrink_record.recipe["calibration"]["data"] == "self"


def test_training_mode_and_returned_object() -> None:
    model = two_blocks().train()
    assert shrink(model, GPTQ, calibration=data(), progress=False) is model
    assert model.training


def test_a_module_that_is_frozen_in_eval_mode_stays_so() -> None:
    model = two_blocks().train()
    model.model.layers[1].eval()
    model.model.norm.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    make_plan(model, {**PRUNE, "calibration": SMALL}, calibration=data(1), progress=False)
    assert {name: module.training for name, module in model.named_modules()} == modes
    shrink(model, {"steps": [{"quantize": {"method": "rtn", "group_size": 16}}]}, progress=False)
    assert model.training and model.model.layers[0].training
    assert not model.model.layers[1].training and not model.model.norm.training


def test_make_plan_changes_nothing_and_its_plan_gives_the_same_model() -> None:
    dense = tiny_llama()
    before = copy.deepcopy(dense.state_dict())
    recipe = {"steps": [*PRUNE["steps"], *GPTQ["steps"]], "calibration": SMALL}
    plan = make_plan(dense, recipe, calibration=data(2), progress=False)
    assert dense.config.to_dict() == tiny_llama().config.to_dict()
    assert all(torch.equal(dense.state_dict()[key], before[key]) for key in before)
    direct = shrink(copy.deepcopy(dense), recipe, calibration=data(2), progress=False)
    planned = shrink(copy.deepcopy(dense), Plan.from_json(plan.to_json()), calibration=data(2), progress=False)
    ours, theirs = direct.state_dict(), planned.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_depth_width_and_bits_in_one_pass() -> None:
    recipe = {
        "steps": [
            {"prune": {"what": "depth", "method": "block_influence", "blocks": 1}},
            *PRUNE["steps"],
            *GPTQ["steps"],
        ]
    }
    model = shrink(tiny_llama(), recipe, calibration=data(), progress=False)
    assert model.config.num_hidden_layers == 3
    assert model.config.intermediate_size < 80
    assert isinstance(model.model.layers[2].mlp.down_proj, CompressedLinear)
    assert model.model.layers[2].mlp.down_proj.in_features == model.config.intermediate_size
    assert len(model.shrink_report.block_errors) == 3
    x = data(1)[0]["input_ids"]
    with torch.no_grad():
        past = model(x[:, :20], use_cache=True).past_key_values
        cached = model(x[:, 20:], past_key_values=past).logits
        torch.testing.assert_close(cached, model(x).logits[:, 20:], rtol=1e-4, atol=1e-4)


def test_refit_helps() -> None:
    dense = tiny_llama()
    errors = []
    for refit in (True, False):
        recipe = {
            "steps": [{"prune": {"what": "width", "method": "wanda", "ratio": 0.2, "units": "mlp", "refit": refit}}]
        }
        errors.append(error(shrink(copy.deepcopy(dense), recipe, calibration=data(8), progress=False), dense))
    assert errors[0] < errors[1]


def test_uneven_pruning_saves_and_loads(tmp_path: Path) -> None:
    recipe = {"portable": False, "steps": [*PRUNE["steps"], *GPTQ["steps"]]}
    model = shrink(two_blocks(), recipe, calibration=data(), progress=False)
    assert model.config.hf_shrink["shapes"]
    assert not model.shrink_report.portable
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    x = data(1)[0]["input_ids"]
    with torch.no_grad():
        assert torch.equal(again(x).logits, model(x).logits)


def test_full_quantization_keeps_the_tie() -> None:
    model = shrink(tiny_llama(tie_word_embeddings=True), "w8-full", progress=False)
    embedding, head = model.model.embed_tokens, model.lm_head
    assert isinstance(embedding, CompressedEmbedding)
    assert isinstance(head, CompressedLinear)
    assert embedding.weight_packed.data_ptr() == head.weight_packed.data_ptr()
    assert model.config.tie_word_embeddings


def test_head_apart_from_a_tied_embedding_is_untied() -> None:
    recipe = {"steps": [{"quantize": {**QUICK_GPTQ, "overrides": {"lm_head": {"scheme": "W8A16"}}}}]}
    dense = two_blocks(tie_word_embeddings=True)
    embedding = dense.model.embed_tokens.weight.detach().clone()
    model = shrink(dense, recipe, calibration=data(), progress=False)
    assert isinstance(model.lm_head, CompressedLinear)
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert not model.config.tie_word_embeddings


def test_bfloat16_model_keeps_its_dtype() -> None:
    model = shrink(two_blocks().to(torch.bfloat16), GPTQ, calibration=data(), progress=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.layers[0].mlp.up_proj.weight_scale.dtype == torch.bfloat16
    assert model(data(1)[0]["input_ids"]).logits.dtype == torch.bfloat16


def test_dtype_of_what_stays() -> None:
    model = shrink(two_blocks(), {**GPTQ, "dtype": "bfloat16"}, calibration=data(), progress=False)
    assert model.model.norm.weight.dtype == torch.bfloat16


def test_plain_module_data_free(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 8))
    x = torch.randn(5, 32)
    before = module(x)
    shrink(module, {"steps": [{"quantize": {"method": "rtn", "scheme": "W8A16", "group_size": 16}}]}, progress=False)
    assert isinstance(module[0], CompressedLinear)
    torch.testing.assert_close(module(x), before, rtol=0.05, atol=0.02)
    with pytest.raises(RecipeError, match="quantized already"):
        shrink(module, {"steps": [{"quantize": {"method": "rtn"}}]}, progress=False)
    with pytest.raises(CalibrationError, match="method: rtn"):
        shrink(nn.Sequential(nn.Linear(4, 4)), GPTQ, calibration=data(), progress=False)


@pytest.mark.parametrize(
    ("recipe", "error_type", "message"),
    [
        ("w4a61", RecipeError, "did you mean 'w4a16'"),
        ({"steps": [{"quantize": {"method": "gtpq"}}]}, RecipeError, "did you mean 'gptq'"),
        ({"steps": [{"quantize": {"dampening": 1}}]}, RecipeError, "did you mean 'damping'"),
        ({"steps": [{"prune": {"what": "width", "method": "wand", "ratio": 0.1}}]}, RecipeError, "'wanda'"),
        ({"steps": [{"prune": {"what": "depth", "method": "kl_greedy", "blocks": 4}}]}, RecipeError, "block"),
        (
            {"steps": [{"prune": {"what": "width", "method": "magnitude", "ratio": 0.99}}]},
            RecipeError,
            "left|leave|ratio",
        ),
        ({"steps": [{"prune": {"what": "depth", "method": "kl_greedy", "blocks": 0}}]}, RecipeError, "changes nothing"),
    ],
)
def test_bad_requests_leave_the_model_alone(recipe: Any, error_type: type[Exception], message: str) -> None:
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error_type, match=message):
        shrink(model, recipe, calibration=data(), progress=False)
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in before)


def test_nan_in_a_weight_is_named() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj"):
        shrink(model, GPTQ, calibration=data(), progress=False)


def test_unknown_family_is_quantized_but_not_pruned() -> None:
    model = tiny_unknown()
    with pytest.raises(ArchitectureError, match="query, key, value"):
        step = {"what": "width", "method": "magnitude", "ratio": 0.2, "refit": False}
        shrink(model, {"steps": [{"prune": step}]}, progress=False)
    shrink(model, {"steps": [{"quantize": {"method": "rtn", "scheme": "W4A16"}}]}, progress=False)
    assert isinstance(model.model.layers[1].mlp.up_proj, CompressedLinear)


def test_public_names() -> None:
    assert set(hf_shrink.__all__) >= {"shrink", "shrink_checkpoint", "make_plan", "evaluate_model", "Plan", "Recipe"}
