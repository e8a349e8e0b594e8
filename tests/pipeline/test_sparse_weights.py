"""`prune: {what: weights}` on whole tiny models: what becomes zero, what it goes with, what comes out of a file."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from conformance.cases_mixtures import MIXTURES
from safetensors.torch import load_file
from stock import Stock
from tiny import QUICK_GPTQ, tiny_llama, tiny_tokenizer
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from hf_shrink import Plan, RecipeError, keep_zeros, make_plan, register_importance, shrink
from hf_shrink.architectures.linears import is_matrix, matrix
from hf_shrink.cli import main
from hf_shrink.errors import ArchitectureError, CalibrationError
from hf_shrink.pipeline.recipes import load_recipe
from hf_shrink.recipe import Recipe
from hf_shrink.runtime.linear import CompressedLinear

IDS = [[5, 17, 40, 8, 99, 130, 7, 23]]


def batches(count: int = 4, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, 300, (4, 24), generator=draw)} for _ in range(count)]


def step(method: str = "magnitude", **keys: Any) -> dict[str, Any]:
    if not {"sparsity", "threshold", "pattern"} & keys.keys():
        keys["sparsity"] = 0.5
    return {"prune": {"what": "weights", "method": method, **keys}}


def shrunk(*steps: Mapping[str, Any], model: Any = None, data: Any = None, **recipe: Any) -> Any:
    body = {"steps": list(steps), **recipe}
    return shrink(model or tiny_llama(), body, calibration=data or batches(), progress=False)


def inner(model: nn.Module) -> dict[str, torch.Tensor]:
    """The matrices inside the blocks, by path."""
    found = {p: m for p, m in model.named_modules() if is_matrix(m) and ("layers." in p or ".h." in p)}
    return {path: matrix(module) for path, module in found.items()}


def divergence(model: Any, dense: Any = None) -> float:
    dense, total = dense or tiny_llama(), 0.0
    with torch.no_grad():
        for batch in batches(3, seed=9):
            p, q = (m(**batch).logits.double().log_softmax(-1) for m in (dense, model))
            total += float((p.exp() * (p - q)).sum(-1).mean()) / 3
    return total


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_sparsities_and_patterns_are_exact_and_nothing_else_changes(method: str) -> None:
    dense = tiny_llama()
    half, pairs = shrunk(step(method)), shrunk(step(method, pattern="2:4"))
    for path, weight in inner(half).items():
        assert int((weight == 0).sum()) == weight.numel() // 2, path
    for path, weight in inner(pairs).items():
        assert ((weight != 0).view(len(weight), -1, 4).sum(-1) == 2).all(), path
    others = {name for name, p in half.named_parameters() if torch.equal(p, dense.get_parameter(name))}
    assert others == {n for n, _ in dense.named_parameters() if n.removesuffix(".weight") not in inner(dense)}
    assert any("50.00% of" in note for note in half.shrink_report.notes)
    assert half.shrink_report.bytes_after == half.shrink_report.bytes_before and half.shrink_report.portable
    assert len(half.shrink_report.block_errors) == (0 if method == "magnitude" else 4)


def test_less_is_lost_with_data_with_updates_and_with_a_refit() -> None:
    lost = {
        (method, refit): divergence(shrunk(step(method, refit=refit)))
        for method in ("magnitude", "wanda", "sparsegpt")
        for refit in (False, True)
        if method != "magnitude" or refit
    }
    assert lost["sparsegpt", False] < 0.95 * lost["wanda", False] < 0.95 * lost["magnitude", True]
    assert lost["wanda", True] < 0.9 * lost["wanda", False]
    assert lost["sparsegpt", True] < 0.98 * lost["sparsegpt", False]


def test_wanda_without_refit_leaves_what_is_kept_alone() -> None:
    dense, model = inner(tiny_llama()), inner(shrunk(step("wanda", refit=False)))
    assert all(torch.equal(weight[weight != 0], dense[path][weight != 0]) for path, weight in model.items())


def test_a_threshold_is_the_set_of_the_formula() -> None:
    dense, model = inner(tiny_llama()), inner(shrunk(step(threshold=0.15)))
    for path, weight in model.items():
        expected = torch.where(dense[path].abs() <= 0.15, 0.0, dense[path])
        assert torch.equal(weight, expected)


def test_global_sparsity_is_one_rank_over_all_targets() -> None:
    dense = tiny_llama()
    with torch.no_grad():
        for layer, factor in zip(dense.model.layers, (1.0, 0.5, 2.0, 0.25), strict=True):
            layer.mlp.up_proj.weight.mul_(factor)
    recipe = step(sparsity=0.4, granularity="global")
    plan = make_plan(dense, {"steps": [recipe]})
    model = shrunk(recipe, model=copy.deepcopy(dense))
    values = torch.cat([weight.flatten() for weight in inner(dense).values()]).abs()
    limit = values.sort().values[round(0.4 * len(values)) - 1]
    for path, weight in inner(model).items():
        assert torch.equal(weight == 0, inner(dense)[path].abs() <= limit), path
    found = [plan.weights.amounts[f"model.layers.{i}.mlp.up_proj.weight"].sparsity for i in (3, 1, 0, 2)]
    assert found == sorted(found, reverse=True) and found[0] > 2 * found[-1]


def test_targets_ignore_and_an_importance_of_ones_own() -> None:
    @register_importance("tests_distance_from_mean")
    def distance(p: torch.Tensor) -> torch.Tensor:
        return (p - p.mean()).abs()

    model = shrunk(step("tests_distance_from_mean", targets=["re:.*mlp.*"], ignore=["re:.*layers.1.*"]))
    for path, weight in inner(model).items():
        assert ((weight == 0).float().mean() == 0.5) == ("mlp" in path and "layers.1." not in path)
    inside = shrunk(step(targets=["model.layers.0", "model.layers.1"], ignore=["model.layers.1.mlp"]))
    for path, weight in inner(inside).items():
        assert ((weight == 0).float().mean() == 0.5) == ("layers.0." in path or "layers.1.self_attn" in path)
    everything = shrunk(step(targets=["Linear", "Embedding"], ignore=[]), model=tiny_llama(tie_word_embeddings=True))
    assert (everything.model.embed_tokens.weight == 0).float().mean() == 0.5
    assert everything.lm_head.weight is everything.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("symmetric", "quantize"),
    [
        (True, {"method": "gptq"}),
        (False, {"method": "gptq", "rescale": False, "refinements": 2}),
        (True, {"method": "gptq", "transforms": ["awq"]}),
        (False, {"method": "rtn"}),
        (False, {"method": "hqq"}),
        (False, {"method": "learned", "steps": 12, "rounding_rate": 0.2}),
        (False, {"method": "gptq", "tune": {"steps": 8, "rounding": True, "rounding_rate": 0.2}}),
    ],
    ids=str,
)
def test_zeros_stay_zero_through_quantization(symmetric: bool, quantize: dict[str, Any]) -> None:
    scheme = {"scheme": "W3A16", "group_size": 16, "symmetric": symmetric}
    steps = step("sparsegpt", pattern="2:4"), {"quantize": {**scheme, **quantize}}
    model = shrunk(*steps, model=tiny_llama(num_hidden_layers=2), portable=False)
    packed = {path: m for path, m in model.named_modules() if isinstance(m, CompressedLinear)}
    assert len(packed) == 14
    for path, module in packed.items():
        assert ((module.weight != 0).view(module.out_features, -1, 4).sum(-1) <= 2).all(), path
    assert any("50.00% of" in note for note in model.shrink_report.notes)


def test_one_solve_beats_rounding_to_nearest_after_it() -> None:
    scheme = {"scheme": "W2A16", "group_size": 16}
    pruned = step("sparsegpt", sparsity=0.3)
    together, apart = (
        divergence(shrunk(pruned, {"quantize": {"method": method, **scheme}})) for method in ("gptq", "rtn")
    )
    assert together < 0.95 * apart


@pytest.mark.parametrize("scheme", ["W8A8", "FP8A16"])
def test_zeros_stay_zero_in_eight_bits(scheme: str) -> None:
    model = shrunk(step(), {"quantize": {"method": "rtn", "scheme": scheme}}, portable=False)
    for module in model.modules():
        if isinstance(module, CompressedLinear):
            assert (module.weight == 0).float().mean() >= 0.5


def test_zeros_stay_zero_in_bitsandbytes() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    steps = step("wanda"), {"quantize": {"method": "bitsandbytes", "scheme": "NF4"}}
    model = shrunk(*steps, model=tiny_llama(**sizes))
    weight = model.model.layers[1].mlp.down_proj.weight
    assert (dequantize_4bit(weight.data, weight.quant_state) == 0).float().mean() >= 0.5


def test_every_kind_in_one_recipe_twice_the_same_and_from_its_plan() -> None:
    steps = (
        {"prune": {"what": "depth", "method": "kl_greedy", "blocks": 1}},
        {"prune": {"what": "width", "method": "wanda", "ratio": 0.2, "units": "mlp"}},
        step("wanda", pattern="1:4"),
        {"quantize": {**QUICK_GPTQ, "scheme": "W4A16", "group_size": 16}},
    )
    one, two = shrunk(*steps), shrunk(*steps)
    plan = Plan.from_json(one.shrink_record.plan.to_json())
    assert plan == one.shrink_record.plan and "weights to 1:4 by wanda" in plan.summary()
    three = shrink(tiny_llama(), plan, calibration=batches(), progress=False)
    for other in (two, three):
        for name, tensor in one.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name]), name
    assert len(one.model.layers) == 3
    channels = one.model.layers[0].mlp.up_proj.out_features
    for layer in one.model.layers:
        assert ((layer.mlp.up_proj.weight != 0).view(channels, -1, 4).sum(-1) <= 1).all()
    assert any(f"1:4 does not divide rows of {channels} weights" in note for note in one.shrink_report.notes)


def test_half_precision_keeps_dtype_and_zeros() -> None:
    model = shrunk(step("sparsegpt", pattern="2:4"), model=tiny_llama().to(torch.bfloat16))
    for weight in inner(model).values():
        assert weight.dtype == torch.bfloat16
        assert ((weight != 0).view(len(weight), -1, 4).sum(-1) <= 2).all()


def test_transposed_matrices_have_their_pattern_along_the_inputs() -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=48, n_head=3, n_layer=2, vocab_size=320, n_positions=64, bos_token_id=1, eos_token_id=2)
    model = shrunk(step("sparsegpt", pattern="2:4"), model=GPT2LMHeadModel(config).eval())
    assert len(inner(model)) == 8
    for weight in inner(model).values():
        assert ((weight != 0).reshape(len(weight), -1, 4).sum(-1) == 2).all()


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_get_zeros_and_stay_in_their_3d_parameters(method: str, dtype: torch.dtype) -> None:
    dense = MIXTURES["mixtral"]()
    names = {name for name, p in dense.named_parameters() if p.dim() == 3}
    assert names
    model = shrunk(step(method), model=copy.deepcopy(dense).to(dtype), data=batches(24))
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in dense.named_parameters()}
    for name in names:
        assert (model.get_parameter(name) == 0).float().mean() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_fewer_experts_with_zeros_in_what_is_left(method: str) -> None:
    model = MIXTURES["mixtral"]()
    count = model.config.num_local_experts
    names = {name for name, p in model.named_parameters() if p.dim() == 3}
    steps = {"prune": {"what": "experts", "method": "reap", "experts": 1}}, step(method)
    model = shrunk(*steps, model=model, data=batches(24))
    for name in names:
        parameter = model.get_parameter(name)
        assert len(parameter) == count - 1
        assert ((parameter == 0).float().mean((1, 2)) - 0.5).abs().max() < 0.01
    with torch.no_grad():
        assert torch.isfinite(model(**batches(1)[0]).logits).all()


def test_a_plan_that_does_not_fit_is_refused() -> None:
    plan = make_plan(tiny_llama(), {"steps": [step()]})
    text = plan.to_json().replace('"sparsity": 0.5', '"sparsity": null').replace('"pattern": null', '"pattern": "2:5"')
    with pytest.raises(RecipeError, match="does not divide"):
        shrink(tiny_llama(), Plan.from_json(text), progress=False)
    with pytest.raises(ArchitectureError, match="does not have"):
        shrink(tiny_llama(), Plan.from_json(plan.to_json().replace("mlp.up_proj", "mlp.up")), progress=False)


def test_stock_loads_the_zeros_and_they_can_be_trained(tmp_path: Path, stock_process: Stock) -> None:
    model = shrink(tiny_llama(), load_recipe("sparsegpt-50"), calibration=batches(), progress=False)
    model.save_pretrained(tmp_path)
    stock = stock_process.logits(tmp_path, "LlamaForCausalLM", IDS)
    with torch.no_grad():
        assert torch.equal(stock, model(torch.tensor(IDS)).logits)
    again = type(model).from_pretrained(tmp_path)
    with keep_zeros(again) as keeper:
        assert len(keeper.kept) == 28 and set(keeper.sparsity().values()) == {0.5}


def test_the_command_writes_a_folder_that_says_what_it_is(tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "out"
    tiny_llama().save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    small = [f"--set=calibration.{key}" for key in ("samples=8", "length=24")]
    steps = ["--set=prune.pattern=1:4", "--set=evaluation.metrics=[]"]
    run = ["run", str(source), "--recipe", "wanda-2-4", "--output", str(output), "--quiet", *small, *steps]
    assert main(run) == 0
    record = json.loads((output / "shrink.json").read_text())
    assert Plan.from_json(record["plan"]).weights.amounts["model.layers.3.mlp.down_proj.weight"].pattern == "1:4"
    assert record["report"]["portable"] and any("75.00% of" in note for note in record["report"]["notes"])
    assert "28 weights to 1:4 by wanda" in (card := (output / "README.md").read_text())
    assert "- sparse" in card and "- pruned" in card
    weight = load_file(output / "model.safetensors")["model.layers.3.mlp.down_proj.weight"]
    assert ((weight != 0).view(48, -1, 4).sum(-1) == 1).all()


def test_notes_and_recipes_say_what_was_done() -> None:
    recipe = Recipe.from_dict({"steps": [step("wanda", pattern=2 * 60 + 4, targets=["Linear"], ignore=[])]})
    assert recipe.prune("weights").pattern == "2:4"  # what YAML makes of 2:4 without quotes
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    changed = recipe.with_overrides(["prune.sparsity=0.3"]).prune("weights")
    assert changed.sparsity == 0.3 and changed.pattern is None
    assert recipe.with_overrides(["prune.pattern=4:8"]).prune("weights").pattern == "4:8"
    model = shrunk(step(pattern="2:5", targets=["Linear"], ignore=["lm_head"]))  # 48 columns are no multiple of 5
    assert any("2:5 does not divide rows of 48 weights" in note for note in model.shrink_report.notes)
    assert (model.model.layers[0].mlp.down_proj.weight == 0).float().mean() == pytest.approx(0.6)
    assert any("neither bytes on disk nor speed" in note for note in model.shrink_report.notes)
    misspelt = shrunk(step(ignore=["model.layers.0.mlp.down_porj"]))
    said = "prune.ignore: 'model.layers.0.mlp.down_porj' means no weight, so nothing is left out by it"
    assert said in misspelt.shrink_report.notes


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"targets": ["re:.*nothing"]}, "means no weight"),
        ({"targets": ["Liner"]}, "did you mean 'Linear'"),
        ({"targets": ["LlamaMLP"]}, "only modules that hold some"),
        ({"ignore": ["LlamaMLP"]}, r"name such a module by its path \('model\.layers\.0\.mlp'\)"),
        ({"targets": ["re:*"]}, "not a valid regex"),
        ({"targets": "Linear"}, "is a list"),
        ({"pattern": "2:5", "targets": ["model.layers.0.mlp.up_proj"]}, "does not divide"),
        ({"method": "wanda", "targets": ["model.embed_tokens"]}, "use magnitude"),
        ({"ratio": 0.5}, "ratio goes with"),
        ({"sparsity": 2}, "from 0 to 1"),
        ({"method": "wandb"}, "did you mean 'wanda'"),
        ({"blocksize": 3}, "has no option"),
    ],
)
def test_what_cannot_be_done_is_said_first(keys: dict[str, Any], match: str) -> None:
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RecipeError, match=match):
        shrunk(step(**keys), model=model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_targets_belong_to_weights_and_data_to_transformers_models() -> None:
    with pytest.raises(RecipeError, match="goes with what: weights"):
        Recipe.from_dict({"steps": [{"prune": {"what": "depth", "method": "kl_greedy", "blocks": 1, "targets": []}}]})
    with pytest.raises(CalibrationError, match="magnitude"):
        shrunk(step("wanda"), model=nn.Sequential(nn.Linear(8, 8)))
