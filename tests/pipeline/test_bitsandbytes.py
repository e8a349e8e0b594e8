"""method: bitsandbytes, from a recipe to a stock checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from safetensors import safe_open
from stock import Stock
from tiny import tiny_llama, tiny_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from hf_shrink.checkpoint.record import read_record
from hf_shrink.errors import CalibrationError, RecipeError
from hf_shrink.pipeline import make_plan, shrink, shrink_checkpoint
from hf_shrink.pipeline.recipes import load_recipe
from hf_shrink.plan import BlockPlan, Plan, StackPlan
from hf_shrink.recipe import QuantizeStep, Recipe
from hf_shrink.runtime.packed import count_parameters

IDS = [[5, 17, 40, 8, 99, 130, 7, 23]]
KINDS = ("NF4", "FP4", "LLM.int8")
HEADS = {"head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2}


def fitting(**changes: Any) -> Any:
    """A model whose widths 4-bit kernels take: hidden 64, 4 heads in 2 groups of 16, 128 channels, 3 blocks."""
    return tiny_llama(**{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, **HEADS, **changes})


def recipe(scheme: str = "NF4", **keys: Any) -> dict[str, Any]:
    return {
        "steps": [{"quantize": {"method": "bitsandbytes", "scheme": scheme, **keys}}],
        "evaluation": {"metrics": []},
    }


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits


def dense_weight(module: Any) -> torch.Tensor:
    """What a bitsandbytes module's integers stand for."""
    if type(module).__name__ == "Linear4bit":
        return dequantize_4bit(module.weight.data, module.weight.quant_state).float()
    scale = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
    return int8_vectorwise_dequant(module.weight.data, scale).float()


def tiny_gpt() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=64, n_head=4, n_layer=2, vocab_size=320, n_positions=64, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(config).eval()


def pruned(what: str) -> Any:
    """Channels out before LLM.int8 ("width"), a block out before NF4 ("depth")."""
    calibration = [{"input_ids": torch.tensor(IDS)}]
    if what == "width":
        prune = {"what": "width", "method": "magnitude", "ratio": 0.2, "units": "mlp", "refit": False}
        steps = [{"prune": prune}, *recipe("LLM.int8")["steps"]]
    else:
        steps = [{"prune": {"what": "depth", "method": "block_influence", "blocks": 1}}, *recipe("NF4")["steps"]]
    return shrink(fitting(), {"steps": steps}, calibration=calibration, progress=False)


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory, stock_process: Stock) -> dict[str, tuple[Any, torch.Tensor]]:
    """By name a model of ours and the logits of its checkpoint in stock transformers, without hf_shrink."""
    folder = tmp_path_factory.mktemp("stock")
    models = {kind: shrink(fitting(), recipe(kind), progress=False) for kind in KINDS}
    models |= {"width": pruned("width"), "depth": pruned("depth")}
    models["transposed"] = shrink(tiny_gpt(), recipe("LLM.int8"), progress=False)
    jobs = []
    for name, model in models.items():
        logits(model)  # an inference must not change what is saved
        model.save_pretrained(folder / name)
        jobs.append({"folder": str(folder / name), "class": type(model).__name__, "ids": IDS})
    stock_process.run(jobs)
    assert not [path.read_text() for path in folder.glob("*/stock.txt")]
    return {name: (model, torch.load(folder / name / "stock.pt")) for name, model in models.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_near_the_dense_ones_and_the_rest_is_untouched(kind: str) -> None:
    dense, model = fitting(), fitting()
    assert shrink(model, recipe(kind), progress=False) is model
    bound = {"NF4": 0.11, "FP4": 0.14, "LLM.int8": 0.01}[kind]
    for path, module in dense.named_modules():
        if type(module) is not torch.nn.Linear:
            continue
        stored = model.get_submodule(path)
        if path == "lm_head":
            assert torch.equal(stored.weight, module.weight)
            continue
        error = (dense_weight(stored) - module.weight).norm() / module.weight.norm()
        assert 0 < error < bound, path
    for name, parameter in dense.named_parameters():
        if "norm" in name or "embed" in name:
            assert torch.equal(model.get_parameter(name), parameter)


@pytest.mark.parametrize("name", [*KINDS, "width", "depth", "transposed"])
def test_stock_gives_the_same_logits(name: str, stock: dict[str, tuple[Any, torch.Tensor]]) -> None:
    model, found = stock[name]
    wanted = logits(model)
    # A CPU with AVX512-BF16 computes stock's 4-bit products in bfloat16.
    assert (found - wanted).norm() / wanted.norm() < (1e-3 if name in ("LLM.int8", "width", "transposed") else 0.05)
    assert model.shrink_report.portable


def test_inference_does_not_change_what_is_saved(tmp_path: Path) -> None:
    model = shrink(fitting(), recipe(), progress=False)
    model.save_pretrained(tmp_path / "a")
    logits(model)
    model.save_pretrained(tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    again = shrink(fitting(), recipe(), progress=False)
    again.save_pretrained(tmp_path / "c")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "c/model.safetensors").read_bytes()


def test_report_counts_scales_and_logical_parameters(tmp_path: Path) -> None:
    model = fitting()
    parameters = count_parameters(model)
    shrink(model, recipe(), progress=False)
    report = model.shrink_report
    assert report.parameters_before == report.parameters_after == parameters
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    assert 0.9 * stored < report.bytes_after <= stored + 4096  # quantization maps are one tensor in memory


def test_targets_and_ignore_become_what_stock_skips() -> None:
    model = shrink(fitting(), recipe(targets=["re:.*mlp.*"], ignore=["re:.*layers\\.1\\..*"]), progress=False)
    formats = model.shrink_record.plan.formats
    assert set(formats) == {f"model.layers.{i}.mlp.{r}_proj" for i in (0, 2) for r in ("gate", "up", "down")}
    skipped = model.config.quantization_config.llm_int8_skip_modules
    assert "lm_head" in skipped and "model.layers.1.mlp.up_proj" in skipped and not set(skipped) & set(formats)
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert (type(module).__name__ == "Linear4bit") == (path in formats)


def test_widths_that_bitsandbytes_gets_wrong_stay_dense_and_are_refused_by_name() -> None:
    model = shrink(fitting(intermediate_size=80), recipe(), progress=False)
    assert not [path for path in model.shrink_record.plan.formats if "mlp" in path]
    assert any("stay dense" in note and "multiples" in note for note in model.shrink_report.notes)
    with pytest.raises(RecipeError, match=r"layers\.0\.mlp\.gate_proj cannot be stored as NF4: 80 x 64"):
        make_plan(fitting(intermediate_size=80), recipe(targets=["re:.*gate_proj"]), progress=False)
    plan = make_plan(fitting(intermediate_size=80), recipe("LLM.int8"), progress=False)
    assert len(plan.formats) == 21


def test_pruned_before() -> None:
    wide, shallow = pruned("width"), pruned("depth")
    assert wide.shrink_record.plan.prunes and wide.config.intermediate_size < 128
    assert len(shallow.model.layers) == 2 and len(shallow.shrink_record.plan.formats) == 14
    for module in (wide.model.layers[2].mlp.up_proj, shallow.model.layers[1].mlp.up_proj):
        assert type(module).__name__ in ("Linear4bit", "Linear8bitLt")


def test_uneven_pruning_is_refused() -> None:
    steps = [
        {"prune": {"what": "width", "method": "magnitude", "ratio": 0.25, "units": "mlp", "refit": False}},
        *recipe()["steps"],
    ]
    with pytest.raises(RecipeError, match="portable: true"):
        make_plan(fitting(), {"portable": False, "steps": steps}, progress=False)
    blocks = {0: BlockPlan(channels=tuple(range(64)))}
    plan = Plan("llama", {"decoder": StackPlan((0, 1, 2), blocks)}, method="bitsandbytes", refit=False)
    name = next(iter(make_plan(fitting(), {"steps": steps}, progress=False).stacks))
    plan = Plan(
        "llama",
        {name: plan.stacks["decoder"]},
        formats={"model.layers.0.mlp.up_proj": "NF4"},
        method="bitsandbytes",
        refit=False,
    )
    with pytest.raises(RecipeError, match="different shapes"):
        shrink(fitting(), plan, progress=False)


def test_transposed_linears_are_stored_too() -> None:
    model = tiny_gpt()
    dense = logits(model)
    shrink(model, recipe("LLM.int8"), progress=False)
    assert len(model.shrink_record.plan.formats) == 8
    assert 0 < (logits(model) - dense).norm() / dense.norm() < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    for kind in ("NF4", "LLM.int8"):
        model = shrink(fitting().to(dtype), recipe(kind), progress=False)
        assert torch.isfinite(logits(model)).all()
        if kind == "NF4":
            assert model.config.quantization_config.bnb_4bit_compute_dtype == dtype


def test_dead_rows_and_constant_rows_come_back() -> None:
    for kind in KINDS:
        model = fitting()
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[:32] = 0
            model.model.layers[0].mlp.up_proj.weight[32:64] = 0.125
        shrink(model, recipe(kind, **({"double_quant": False} if kind != "LLM.int8" else {})), progress=False)
        weight = dense_weight(model.model.layers[0].mlp.up_proj)
        assert weight[:32].abs().max() == 0
        assert torch.allclose(weight[32:64], torch.tensor(0.125), rtol=1e-2)
        assert torch.isfinite(logits(model)).all()


def test_weights_beyond_float16_are_named() -> None:
    model = fitting()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = 1e6
    with pytest.raises(CalibrationError, match=r"layers\.1\.mlp\.up_proj holds weights beyond float16"):
        shrink(model, recipe("LLM.int8"), progress=False)


@pytest.mark.parametrize(
    "keys",
    [
        {"group_size": 128},
        {"symmetric": True},
        {"strategy": "channel"},
        {"tune": {"steps": 3}},
        {"transforms": ["awq"]},
        {"overrides": {"lm_head": {"scheme": "W8A16"}}},
        {"symmetric_inputs": True},
        {"starved_experts": "rtn"},
    ],
    ids=str,
)
def test_keys_that_the_format_decides_are_refused(keys: dict[str, Any]) -> None:
    (key,) = keys
    with pytest.raises(RecipeError, match=rf"quantize\.{key} does not go with method bitsandbytes"):
        load_recipe(recipe(**keys))


def test_what_a_format_has_no_use_for_may_be_written_out_as_nothing() -> None:
    """As recipes are that were read and written again."""
    for name in ("nf4", "llm-int8"):
        read = load_recipe(name)
        written = read.to_dict()
        written["steps"][0]["quantize"] |= {"symmetric_inputs": False, "starved_experts": "error", "head": None}
        assert load_recipe(written) == read
        with pytest.raises(RecipeError, match=r"starved_experts does not go with method bitsandbytes"):
            read.with_overrides(["quantize.starved_experts=rtn"])


def test_scheme_and_method_must_go_together() -> None:
    with pytest.raises(RecipeError, match=r"NF4 is a scheme of method bitsandbytes.*method: bitsandbytes, scheme: NF4"):
        Recipe.from_dict({"steps": [{"quantize": {"scheme": "nf4"}}]})
    with pytest.raises(RecipeError, match="FP4 is a scheme of method bitsandbytes"):
        QuantizeStep(overrides={"lm_head": {"scheme": "FP4"}})
    with pytest.raises(RecipeError, match="FP4 is a scheme of method bitsandbytes"):
        Recipe.from_dict({"steps": [{"quantize": {"effort": "fast", "scheme": "FP4"}}]})
    with pytest.raises(RecipeError, match="needs one of its own schemes, not 'W4A16'"):
        Recipe.from_dict({"steps": [{"quantize": {"method": "bitsandbytes", "scheme": "W4A16"}}]})
    with pytest.raises(RecipeError, match=r"did you mean 'LLM\.int8'"):
        Recipe.from_dict({"steps": [{"quantize": {"method": "bitsandbytes", "scheme": "llmint8"}}]})
    with pytest.raises(RecipeError, match="has no option 'double_quants'; did you mean 'double_quant'"):
        load_recipe(recipe(double_quants=True))
    with pytest.raises(RecipeError, match="threshold must be a number"):
        load_recipe(recipe("LLM.int8", threshold=-1))
    with pytest.raises(RecipeError, match="transformers models only"):
        shrink(torch.nn.Sequential(torch.nn.Linear(64, 64)), recipe(), progress=False)


def test_tied_heads_and_embeddings_cannot_be_stored_so() -> None:
    tied = fitting(tie_word_embeddings=True)
    with pytest.raises(RecipeError, match="lm_head cannot be stored as NF4: it shares its weight"):
        make_plan(tied, recipe(targets=["lm_head"], ignore=[]), progress=False)
    with pytest.raises(RecipeError, match="bitsandbytes takes Linear only, not Embedding"):
        make_plan(fitting(), recipe(targets=["model.embed_tokens"], ignore=[]), progress=False)
    with pytest.raises(RecipeError, match="quantized already"):
        shrink(shrink(fitting(), recipe(), progress=False), recipe(), progress=False)


def test_recipe_and_plan_survive_being_written() -> None:
    for name, kind in (("nf4", "NF4"), ("llm-int8", "LLM.int8")):
        loaded = load_recipe(name)
        assert loaded.quantize is not None and loaded.quantize.format == kind
        assert Recipe.from_dict(loaded.to_dict()) == loaded
    plan = make_plan(fitting(), "nf4", progress=False)
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.summary() == "21 weights NF4 by bitsandbytes"
    assert set(plan.bits.values()) == {4} and not plan.schemes
    with pytest.raises(RecipeError, match="format 'NF5'; did you mean 'NF4'"):
        Plan.from_json(plan.to_json().replace('"NF4"', '"NF5"'))
    with pytest.raises(RecipeError, match="not those of method gptq"):
        shrink(fitting(), Plan("llama", formats=plan.formats, method="gptq"), progress=False)


def test_a_checkpoint_of_it_says_what_it_is(tmp_path: Path) -> None:
    fitting().save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    asked = {
        **load_recipe("nf4").to_dict(),
        "evaluation": {"data": "self", "samples": 2, "length": 16, "metrics": ["kl_divergence"]},
    }
    report = shrink_checkpoint(tmp_path / "dense", tmp_path / "out", asked, progress=False)
    assert report.portable and report.compression > 1.2
    assert report.evaluation["compressed"]["kl_divergence"]
    card = (tmp_path / "out/README.md").read_text()
    assert "- bitsandbytes" in card and "- 4-bit" in card and "compressed-tensors" not in card.split("---")[1]
    assert "with bitsandbytes installed" in card and "21 weights NF4 by bitsandbytes" in card
    assert (tmp_path / "out/report.html").is_file()
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "bitsandbytes" and config["bnb_4bit_quant_type"] == "nf4"
    shrink(fitting(), "nf4", progress=False).save_pretrained(tmp_path / "in place")
    weights = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("out", "in place")]
    assert weights[0] == weights[1]


def test_command_line(tmp_path: Path) -> None:
    from hf_shrink.cli import main

    fitting().save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    command = ["run", str(tmp_path / "dense"), "--output", str(tmp_path / "o"), "--evaluation", "none", "--quiet"]
    assert main([*command, "--recipe", "llm-int8"]) == 0
    assert read_record(tmp_path / "o/shrink.json").plan.summary() == "21 weights LLM.int8 by bitsandbytes"
    assert main([*command, "--overwrite", "--recipe", "nf4", "--set", "quantize.group_size=64"]) == 2
