"""`quantize: {transforms: [...]}` on the whole road: recipe, plan, run, notes, checkpoint in stock."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import QUICK_GPTQ, tiny_llama
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, OlmoConfig, OlmoForCausalLM

from hf_shrink import Plan, make_plan, shrink
from hf_shrink.architectures import bind
from hf_shrink.calibration.walk import StackWalk
from hf_shrink.errors import RecipeError
from hf_shrink.pipeline.transforming import BlockScaler
from hf_shrink.plan import Scheme
from hf_shrink.recipe import Recipe
from hf_shrink.transforms import build_transforms

Data = list[dict[str, Tensor]]


def data(batches: int = 3, seed: int = 7) -> Data:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, 300, (4, 24), generator=generator)} for _ in range(batches)]


def recipe(*transforms: Any, method: str = "rtn", portable: bool = True, **step: Any) -> dict[str, Any]:
    body = {"method": method, "scheme": "W4A16", "group_size": 16, "transforms": list(transforms), **step}
    body |= QUICK_GPTQ if method == "gptq" else {}
    return {"portable": portable, "steps": [{"quantize": body}]}


def run(model: Any, *transforms: Any, **step: Any) -> Any:
    return shrink(copy.deepcopy(model), recipe(*transforms, **step), calibration=data(), progress=False)


def error(model: nn.Module, dense: nn.Module) -> float:
    x = data(1, seed=99)[0]["input_ids"]
    with torch.no_grad():
        difference = model(x).logits.float() - dense(x).logits
        return float(difference.square().mean() / dense(x).logits.square().mean())


def two_blocks(**changes: Any) -> Any:
    return tiny_llama(num_hidden_layers=2, **changes)


def with_outliers() -> Any:
    """Norms let a few channels through 40 times larger, as in large models; what reads them is smaller by as much."""
    model = two_blocks()
    with torch.no_grad():
        for block in model.model.layers:
            for norm, readers in (
                (block.input_layernorm, (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)),
                (block.post_attention_layernorm, (block.mlp.gate_proj, block.mlp.up_proj)),
            ):
                norm.weight[[3, 20]] *= 40
                for reader in readers:
                    reader.weight[:, [3, 20]] /= 10
    return model


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_awq_helps_where_channels_stand_out(method: str) -> None:
    dense = with_outliers()
    plain, scaled = run(dense, method=method), run(dense, "awq", method=method)
    assert error(scaled, dense) < 0.9 * error(plain, dense)
    plain_errors = plain.shrink_report.block_errors or run(dense, method="gptq").shrink_report.block_errors
    assert len(scaled.shrink_report.block_errors) == len(plain_errors) == 2
    assert any("scales of 8 inputs" in note for note in scaled.shrink_report.notes)


def test_rotation_helps_where_the_stream_has_outliers() -> None:
    dense = tiny_llama()
    with torch.no_grad():
        dense.model.embed_tokens.weight[:, 7] *= 50
        for block in dense.model.layers:
            block.self_attn.o_proj.weight[7] *= 50
            block.mlp.down_proj.weight[7] *= 50
    tensor = {"strategy": "tensor", "group_size": None, "scheme": "W6A16"}
    assert error(run(dense, "rotate", **tensor), dense) < 0.8 * error(run(dense, **tensor), dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_only_rounding_moves_the_outputs(dtype: torch.dtype) -> None:
    dense = two_blocks()
    model = copy.deepcopy(dense).to(dtype)
    moved = error(run(model, "rotate", "awq", {"smooth": {"alpha": 0.4}}, scheme="W8A16"), dense)
    assert moved < (2e-3 if dtype == torch.float32 else 1e-2)
    kept = run(model, "rotate", "awq", scheme="W8A16")
    assert {p.dtype for p in kept.parameters()} == {dtype}


def test_the_walk_scales_without_changing_the_block() -> None:
    model = tiny_llama()
    stack = bind(model).stacks[0]
    schemes = {path: Scheme(3, True, "group", 16) for block in stack.blocks for path in block.roles}
    walk = StackWalk(model, [b.module for b in stack.blocks], data())
    dense = walk.outputs()
    before = copy.deepcopy(stack.blocks[0].module.state_dict())
    scaler = BlockScaler(model, build_transforms(["awq", "smooth"]), schemes, weighted=True)
    scaler.scale(walk, stack.spec, stack.blocks[0], torch.float32)
    assert scaler.scaled == 8
    torch.testing.assert_close(walk.reference, dense[0], rtol=1e-5, atol=1e-5)  # what block errors compare with
    for old, new in zip(dense, walk.outputs(), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-4)
    changed = [k for k, v in stack.blocks[0].module.state_dict().items() if not torch.equal(v, before[k])]
    assert len(changed) == 9  # seven matrices, two norms


def test_block_errors_stay_relative_to_the_dense_block() -> None:
    dense = with_outliers()
    eight = run(dense, "rotate", "awq", scheme="W8A16").shrink_report.block_errors
    three = run(dense, "rotate", "awq", scheme="W3A16").shrink_report.block_errors
    assert max(eight.values()) < 2e-3 < min(three.values()) < 1


def test_same_seed_same_bytes() -> None:
    first, second = (run(two_blocks(), "rotate", "awq", method="gptq").state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    other = run(two_blocks(), {"rotate": {"seed": 1}}, "awq").state_dict()
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_after_width_pruning() -> None:
    steps = [{"prune": {"what": "width", "method": "wanda", "ratio": 0.2}}, *recipe("rotate", "awq")["steps"]]
    model = shrink(two_blocks(), {"steps": steps}, calibration=data(), progress=False)
    assert model.config.intermediate_size < 80
    assert any("scales of 8 inputs" in note for note in model.shrink_report.notes)
    reference = copy.deepcopy(steps)
    reference[1]["quantize"] |= {"transforms": [], "scheme": "W8A16"}
    pruned = shrink(two_blocks(), {"steps": reference}, calibration=data(), progress=False)
    x = data(1, seed=99)[0]["input_ids"]
    with torch.no_grad():
        difference = (model(x).logits - pruned(x).logits).square().mean() / pruned(x).logits.square().mean()
    assert difference < 0.2


def test_a_saved_model_is_an_ordinary_checkpoint(tmp_path: Path) -> None:
    model = run(two_blocks(), "rotate", "awq", method="gptq")
    assert model.shrink_report.portable
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    x = data(1)[0]["input_ids"]
    with torch.no_grad():
        assert torch.equal(again(x).logits, model(x).logits)
    plain = run(two_blocks(), method="gptq")
    shapes = {key: (value.shape, value.dtype) for key, value in plain.state_dict().items()}
    assert {key: (value.shape, value.dtype) for key, value in model.state_dict().items()} == shapes
    plain.save_pretrained(tmp_path / "plain")
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(
        (tmp_path / "plain" / "config.json").read_text()
    )


def test_tied_embeddings_are_rotated_only_with_a_head_of_its_own() -> None:
    dense = tiny_llama(tie_word_embeddings=True)
    skipped = run(dense, "rotate")
    assert any("was not rotated" in note and "overrides" in note for note in skipped.shrink_report.notes)
    assert torch.equal(skipped.model.embed_tokens.weight, dense.model.embed_tokens.weight)
    asked = run(dense, "rotate", scheme="W8A16", overrides={"lm_head": {"scheme": "W8A16"}})
    assert not asked.config.tie_word_embeddings
    assert not torch.equal(asked.model.embed_tokens.weight, dense.model.embed_tokens.weight)
    assert error(asked, dense) < 2e-3


def test_what_cannot_be_done_is_said() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=320, n_positions=64)).eval()
    model = shrink(gpt2, recipe("rotate", "awq", portable=False), calibration=data(), progress=False)
    notes = model.shrink_report.notes
    assert any("was not rotated: LayerNorm" in note for note in notes)
    assert any("inputs of down were not scaled in 2 blocks: gelu_new" in note for note in notes)
    config = OlmoConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    notes = shrink(
        OlmoForCausalLM(config).eval(), recipe("rotate", "awq"), calibration=data(), progress=False
    ).shrink_report.notes
    assert any("was not rotated: found by the names of its modules" in note for note in notes)
    assert any("not scaled in 2 blocks: the table of model type 'olmo' has no roles" in note for note in notes)
    with pytest.raises(RecipeError, match="only transformers models"):
        shrink(nn.Sequential(nn.Linear(16, 16)), recipe("rotate"), progress=False)


def test_plans_and_recipes_carry_transforms() -> None:
    asked = Recipe.from_dict(recipe({"rotate": {"seed": 3}}, "awq"))
    assert Recipe.from_dict(asked.to_dict()) == asked
    plan = make_plan(two_blocks(), asked, calibration=data(), progress=False)
    assert plan.transforms == ({"rotate": {"seed": 3}}, "awq")
    assert "folded into the weights: rotate (seed: 3), awq" in plan.summary()
    again = Plan.from_json(plan.to_json())
    assert again == plan
    direct = shrink(two_blocks(), asked, calibration=data(), progress=False).state_dict()
    planned = shrink(two_blocks(), again, calibration=data(), progress=False).state_dict()
    assert all(torch.equal(direct[key], planned[key]) for key in direct)


@pytest.mark.parametrize(
    ("transforms", "message"),
    [
        (["awk"], "did you mean 'awq'"),
        ("awq", r"is a list, for example \[awq\]"),
        ({"awq": {}}, "is a list"),
        ([{"awq": {"gird": 3}}], "did you mean 'grid'"),
        (["awq", "rotate"], "comes first"),
    ],
)
def test_bad_transforms_are_found_when_the_recipe_is_read(transforms: Any, message: str) -> None:
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RecipeError, match=message):
        shrink(model, {"steps": [{"quantize": {"transforms": transforms}}]}, calibration=data(), progress=False)
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in before)


def test_rotation_alone_needs_no_data() -> None:
    model = shrink(tiny_llama(), recipe("rotate"), progress=False)
    assert not model.shrink_report.calibration
    assert error(model, tiny_llama()) < 0.5


def test_smooth_without_rounded_activations_is_remarked() -> None:
    notes = run(tiny_llama(), "smooth").shrink_report.notes
    assert any("awq is meant for that" in note for note in notes)
