"""Vision-language models: the text is compressed, with images in it; the image side only where it is asked for."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.cases import CASES
from image_batches import IMAGE, Inputs, batches_for, llava_batch, text_batch
from tiny import QUICK_GPTQ
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_shrink import make_plan, shrink
from hf_shrink.architectures import bind
from hf_shrink.calibration.walk import StackWalk
from hf_shrink.errors import CalibrationError
from hf_shrink.evaluation import evaluate_model
from hf_shrink.pipeline import running
from hf_shrink.runtime.linear import CompressedLinear

NAMES = ["llava", "llava_tied", "qwen2_vl", "qwen2_vl_tied", "qwen2_5_vl"]
KINDS = ["llava", "qwen2_vl", "qwen2_5_vl"]
TOWER = {"llava": "vision_tower", "qwen2_vl": "visual.blocks", "qwen2_5_vl": "visual.blocks"}
PROJECTOR = {"llava": "multi_modal_projector", "qwen2_vl": "visual.merger", "qwen2_5_vl": "visual.merger"}
W8 = {"method": "gptq", "scheme": "W8A16", "group_size": 16}


def recipe(**changes: Any) -> dict[str, Any]:
    step = {**W8, **changes}
    return {"steps": [{"quantize": {**step, **(QUICK_GPTQ if step["method"] == "gptq" else {})}}]}


def shrunk(model: PreTrainedModel, wanted: dict[str, Any], batches: list[Inputs], **options: Any) -> Any:
    return shrink(copy.deepcopy(model), wanted, calibration=batches, progress=False, **options)


def logits(model: nn.Module, batch: Inputs) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


def packed(model: nn.Module) -> set[str]:
    return {path for path, module in model.named_modules() if isinstance(module, CompressedLinear)}


def error(model: nn.Module, dense: nn.Module, batch: Inputs) -> float:
    expected = logits(dense, batch)
    return float((logits(model, batch) - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", KINDS)
def test_the_walk_sees_image_tokens_and_lengths_of_their_own(name: str) -> None:
    model, batches = CASES[name].build(), batches_for(name)
    blocks = bind(model).stack("text").blocks
    matrices = {path: model.get_submodule(path) for block in blocks for path in block.roles}
    moments = {path: torch.zeros(m.in_features, m.in_features, dtype=torch.float64) for path, m in matrices.items()}
    outputs: dict[int, list[Tensor]] = {block.index: [] for block in blocks}
    real: Tensor

    def moment(path: str) -> Any:
        def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].double()[real]
            moments[path] += rows.T @ rows

        return add

    def keep(index: int) -> Any:
        return lambda _, __, output: outputs[index].append(output)

    handles = [module.register_forward_pre_hook(moment(path)) for path, module in matrices.items()]
    handles += [block.module.register_forward_hook(keep(block.index)) for block in blocks]
    for batch in batches:
        real = batch["attention_mask"].bool()
        logits(model, batch)
    for handle in handles:
        handle.remove()

    walk = StackWalk(model, [block.module for block in blocks], batches)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert walk.tokens == tokens
    for block in blocks:
        found = walk.statistics({path: matrices[path] for path in block.roles})
        for path, statistics in found.items():
            assert statistics.tokens == tokens
            assert (statistics.hessian - moments[path]).norm() <= 1e-4 * moments[path].norm()
        # Twice through a block gives the same: no key or value of the first time is left anywhere.
        assert all(torch.equal(a, b) for a, b in zip(walk.outputs(), walk.outputs(), strict=True))
        walk.advance()
        assert all(torch.equal(a, b) for a, b in zip(walk.hidden, outputs[block.index], strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_the_text_is_packed_and_the_image_side_untouched(name: str, tmp_path: Path) -> None:
    dense, batches = CASES[name].build(), batches_for(name)
    model = shrunk(dense, recipe(), batches)
    text = {path for block in bind(dense).blocks for path in block.roles}
    assert packed(model) == text and all("language_model" in path for path in text)
    state = model.state_dict()
    for path, tensor in dense.state_dict().items():
        if path.rpartition(".")[0] not in text:
            assert torch.equal(state[path], tensor), path
    assert model.shrink_report.portable and set(model.shrink_report.block_errors) == {
        b.path for b in bind(dense).blocks
    }

    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    settings = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4}
    for batch in batches:
        assert 0 < error(model, dense, batch) < 0.05
        assert torch.equal(logits(loaded, batch), logits(model, batch))
        ids = model.generate(**batch, **settings)
        assert ids.shape[1] == batch["input_ids"].shape[1] + 4
        assert torch.equal(loaded.generate(**batch, **settings), ids)
        assert torch.equal(loaded.generate(**batch, **settings, use_cache=False), ids)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_images_in_the_calibration_make_images_better(name: str) -> None:
    dense, batches = CASES[name].build(), batches_for(name)
    few = {"scheme": "W3A16", "method": "gptq"}
    with_images = shrunk(dense, recipe(**few), batches)
    ids_only = shrunk(dense, recipe(**few), [text_batch(24, seed=seed) for seed in range(4)])
    errors = [sum(error(model, dense, batch) for batch in batches) for model in (with_images, ids_only)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("method", ["rtn", pytest.param("learned", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", KINDS)
def test_transforms_fold_into_the_text_beside_a_tower(name: str, method: str) -> None:
    dense, batches = CASES[name].build(), batches_for(name)
    overrides = {f"re:.*{TOWER[name]}.*": {}}
    steps = {"steps": 10} if method == "learned" else {}
    wanted = recipe(method=method, overrides=overrides, transforms=["rotate", "awq"], **steps)
    model = shrunk(dense, wanted, batches)
    notes = model.shrink_report.notes
    assert "scales of 16 inputs were folded into the weights" in notes
    assert any("inputs of all were not scaled in 3 blocks" in note for note in notes)  # the tower's
    assert any("text was not rotated: the features of images" in note for note in notes)
    assert any("learned rounding took" in note for note in notes) == (method == "learned")
    for batch in batches:
        assert 0 < error(model, dense, batch) < 0.1


def test_llava_knows_the_norms_of_the_text_it_holds() -> None:
    """A Gemma's norms store their weight minus 1."""
    dense = CASES["llava"].build()
    (text,) = bind(dense).stacks
    assert text.spec is not None and text.spec.norm_offset == 0 and text.blocks[0].attention.spec.norm
    dense.config.text_config.model_type = "gemma"
    (text,) = bind(dense).stacks
    assert text.spec is not None and text.spec.norm_offset == 1


@pytest.mark.parametrize("name", KINDS)
def test_a_target_of_its_own_quantizes_the_tower(name: str) -> None:
    dense, batches = CASES[name].build(), batches_for(name)
    model = shrunk(dense, recipe(targets=[f"re:.*{TOWER[name]}\\..*"]), batches)
    (tower,) = bind(dense).towers
    assert packed(model) == {path for block in tower.blocks for path in block.roles}
    assert set(model.shrink_report.block_errors) == {block.path for block in tower.blocks}
    assert 0 < error(model, dense, batches[0]) < 0.05
    assert error(model, dense, batches[1]) == 0  # no image in it


@pytest.mark.parametrize("name", KINDS)
def test_towers_then_projector_then_text_then_head(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, batches = CASES[name].build(), batches_for(name)
    order: list[str] = []
    real = running.solve_and_pack

    def noted(model: Any, tasks: Any, method: Any) -> list[str]:
        assert all(task.statistics is not None for task in tasks)
        order.extend(task.path for task in tasks)
        return real(model, tasks, method)

    monkeypatch.setattr(running, "solve_and_pack", noted)
    overrides = {f"re:.*{TOWER[name]}.*": {"scheme": "W4A16"}, f"re:.*{PROJECTOR[name]}.*": {}, "lm_head": {}}
    model = shrunk(dense, recipe(overrides=overrides), batches)
    (tower,) = bind(dense).towers
    text = bind(dense).stack("text")
    places = [
        next(i for i, part in enumerate((tower.path, PROJECTOR[name], text.path, "lm_head")) if part in path)
        for path in order
    ]
    assert places == sorted(places) and set(places) == {0, 1, 2, 3}
    assert packed(model) == {path for path, module in dense.named_modules() if isinstance(module, nn.Linear)}
    assert {model.get_submodule(path).scheme.bits for path in tower.blocks[0].roles} == {4}
    assert 0 < error(model, dense, batches[0]) < 0.5


def test_a_target_that_means_the_text_too_leaves_the_tower() -> None:
    dense, batches = CASES["llava"].build(), batches_for("llava")
    model = shrunk(dense, recipe(targets=["re:.*[qkv]_proj"]), batches)
    assert packed(model) and all("language_model" in path for path in packed(model))
    assert any("image side" in note for note in model.shrink_report.notes)
    both = shrunk(dense, recipe(targets=["re:.*[qkv]_proj", "re:.*vision_tower.*[qkv]_proj"]), batches)
    assert any("vision_tower" in path for path in packed(both))
    assert all(path.endswith(("q_proj", "k_proj", "v_proj")) for path in packed(both))
    assert not any("image side" in note for note in both.shrink_report.notes)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_a_tower_without_images_is_an_error_before_anything_changes(name: str) -> None:
    model = CASES[name].build()
    before = copy.deepcopy(model.state_dict())
    wanted = recipe(overrides={f"re:.*{TOWER[name]}.*": {}})
    with pytest.raises(CalibrationError, match="no batch of the calibration data comes to it"):
        shrink(model, wanted, calibration=[text_batch()], progress=False)
    assert model.state_dict().keys() == before.keys()
    data_free = shrink(model, recipe(method="rtn", targets=[f"re:.*{TOWER[name]}\\..*"]), progress=False)
    assert packed(data_free)


def test_padding_of_the_text_is_not_padding_of_the_image() -> None:
    """17 tokens of text of which one is padding, and 17 positions of the tower (16 patches and a class token)."""
    model = CASES["llava"].build()
    ids = torch.full((1, 17), IMAGE)
    mask = torch.ones_like(ids)
    ids[0, 0] = mask[0, 0] = 0
    batch = {**llava_batch(rows=1), "input_ids": ids, "attention_mask": mask}
    (tower,) = bind(model).towers
    walk = StackWalk(model, [block.module for block in tower.blocks], [batch], padded=False)
    found = walk.statistics({path: model.get_submodule(path) for path in tower.blocks[0].roles})
    assert {statistics.tokens for statistics in found.values()} == {17}


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_pruned_by_what_images_say(name: str, tmp_path: Path) -> None:
    dense, batches = CASES[name].build(), batches_for(name)
    steps = [
        {"prune": {"what": "depth", "method": "kl_greedy", "blocks": 1}},
        {"prune": {"what": "width", "method": "wanda", "ratio": 0.15, "units": "mlp"}},
        *recipe()["steps"],
    ]
    model = shrunk(dense, {"steps": steps}, batches)
    assert len(bind(model).stack("text").blocks) == 3 and model.config.text_config.num_hidden_layers == 3
    assert len(bind(model).towers[0].blocks) == 3
    assert model.shrink_report.portable
    assert model.config.text_config.intermediate_size < 80
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    for batch in batches:
        assert torch.equal(logits(loaded, batch), logits(model, batch))


@pytest.mark.parametrize(("name", "text_says_so"), [("llava_tied", True), ("qwen2_vl_tied", False)])
def test_a_tied_head_packed_apart_stays_apart(name: str, text_says_so: bool, tmp_path: Path) -> None:
    dense, batches = CASES[name].build(), batches_for(name)
    if text_says_so:  # as in older configs
        dense.config.text_config.tie_word_embeddings = True
    model = shrunk(dense, recipe(overrides={"lm_head": {}}), batches)
    assert model.shrink_report.portable
    model.save_pretrained(tmp_path)
    assert "dequantize" not in json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert "lm_head" in packed(loaded) and not loaded.config.tie_word_embeddings
    assert torch.equal(logits(loaded, batches[0]), logits(model, batches[0]))


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_scores_leave_out_the_image_tokens(name: str) -> None:
    dense, batches = CASES[name].build(), batches_for(name)
    model = shrunk(dense, recipe(scheme="W4A16"), batches)
    result = evaluate_model(model, batches, baseline=dense)
    scored = 0
    for batch in batches:
        real, written = batch["attention_mask"].bool(), batch["input_ids"] != IMAGE
        scored += int((real[:, 1:] & real[:, :-1] & written[:, 1:]).sum())
    assert result["tokens"] == scored
    assert result["model"]["kl_divergence"]["value"] > 0
    bf16 = evaluate_model(copy.deepcopy(dense).bfloat16(), batches, baseline=dense)
    assert 0 < bf16["model"]["kl_divergence"]["value"] < 0.1


def test_bfloat16_with_a_tower_and_the_same_bytes_again() -> None:
    dense, batches = CASES["qwen2_vl"].build().bfloat16(), batches_for("qwen2_vl")[:2]
    wanted = recipe(overrides={"re:.*visual.*": {}})
    first, second = (shrunk(dense, wanted, batches).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["model.language_model.layers.0.self_attn.q_proj.weight_scale"].dtype == torch.bfloat16


def test_a_plan_made_once_does_the_same() -> None:
    dense, batches = CASES["llava"].build(), batches_for("llava")[:2]
    wanted = recipe(overrides={"re:.*vision_tower.*": {}})
    plan = make_plan(dense, wanted, calibration=batches, progress=False)
    assert plan.to_json() == type(plan).from_json(plan.to_json()).to_json()
    by_plan, by_recipe = shrunk(dense, plan, batches), shrunk(dense, wanted, batches)
    for batch in batches:
        assert torch.equal(logits(by_plan, batch), logits(by_recipe, batch))
