"""Encoders, vision models and encoder-decoders: cutting and removing does what masking and bypassing does."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conformance.cases_encoders import CASES, WHISPER, Case
from conformance.references import assert_near, bypass, far_apart, masked, outputs, plan_for
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, WhisperConfig, WhisperForAudioClassification

from hf_shrink.architectures import bind
from hf_shrink.calibration.capture import model_inputs
from hf_shrink.calibration.walk import StackWalk
from hf_shrink.errors import ArchitectureError
from hf_shrink.plan import BlockPlan, Plan, StackPlan
from hf_shrink.surgery import apply_structure, build_skeleton, is_uneven, resize_skeleton, without_blocks

# Heads of these can be removed within stock config keys.
OWN_HEAD_SIZE = ("vit", "t5")
DECODERS = ("bert_decoder", "whisper", "t5", "t5_gated", "bart")

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@every_case
def test_a_plan_that_keeps_everything_changes_nothing(case: Case) -> None:
    model = case.build()
    before = outputs(model, case.inputs())
    stacks = {
        stack.name: StackPlan(
            tuple(range(len(stack.blocks))),
            {
                b.index: BlockPlan(
                    tuple(range(b.attention.heads)),
                    tuple(range(b.mlp.channels)),
                    tuple(range(b.cross_attention.heads)) if b.cross_attention else None,
                )
                for b in stack.blocks
            },
        )
        for stack in bind(model).stacks
    }
    apply_structure(model, Plan(model.config.model_type, stacks))
    assert not is_uneven(model)
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, case.inputs()), before, strict=True))


@every_case
def test_uniform_pruning_equals_masking_and_loads_in_stock(case: Case, tmp_path: Path) -> None:
    model = case.build()
    dense = outputs(model, case.inputs())
    heads = model.config.model_type in OWN_HEAD_SIZE
    plan = plan_for(model, heads=heads, uneven=False)
    expected = outputs(masked(model, plan), case.inputs())
    assert far_apart(dense, expected)

    apply_structure(model, plan)
    cut = outputs(model, case.inputs())
    assert_near(cut, expected)
    assert not is_uneven(model)

    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert all(torch.equal(a, b) for a, b in zip(outputs(loaded, case.inputs()), cut, strict=True))


@every_case
def test_uneven_pruning_equals_masking_and_its_record_rebuilds_it(case: Case) -> None:
    model = case.build()
    plan = plan_for(model, heads=True, uneven=True)
    expected = outputs(masked(model, plan), case.inputs())
    apply_structure(model, plan)
    cut = outputs(model, case.inputs())
    assert_near(cut, expected)
    assert is_uneven(model)

    skeleton = build_skeleton(model)
    resize_skeleton(skeleton, model.config.hf_shrink)
    assert {k: v.shape for k, v in skeleton.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    rebuilt = type(model)(copy.deepcopy(model.config)).eval()
    resize_skeleton(rebuilt, model.config.hf_shrink)
    rebuilt.load_state_dict(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(outputs(rebuilt, case.inputs()), cut, strict=True))


@every_case
@pytest.mark.parametrize("removed", [{0}, {1}, {1, 2}], ids=str)
def test_removing_blocks_equals_bypassing_them(case: Case, removed: set[int], tmp_path: Path) -> None:
    model = case.build()
    reference = copy.deepcopy(model)
    for stack in bind(reference).stacks:
        bypass(stack, removed)
    binding = bind(model)
    plan = Plan(
        model.config.model_type,
        {s.name: StackPlan(tuple(b.index for b in s.blocks if b.index not in removed)) for s in binding.stacks},
    )
    if 0 in removed and any(s.spec.first_is_special for s in binding.stacks):
        with pytest.raises(ArchitectureError, match="first block"):
            apply_structure(model, plan)
        return
    apply_structure(model, plan)
    cut = outputs(model, case.inputs())
    assert_near(cut, outputs(reference, case.inputs()), tolerance=1e-6)
    if removed != {1}:  # the others would only save another number of blocks
        return
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(outputs(loaded, case.inputs()), cut, strict=True))


def test_a_weighted_sum_of_all_blocks_keeps_them() -> None:
    model = WhisperForAudioClassification(WhisperConfig(**WHISPER, use_weighted_layer_sum=True)).eval()
    with pytest.raises(ArchitectureError, match="weighted sum of all blocks"):
        apply_structure(model, Plan("whisper", {"encoder": StackPlan((0, 2))}))
    apply_structure(model, plan_for(model, heads=True, uneven=True))
    assert outputs(model, CASES["whisper_classifier"].inputs())[0].isfinite().all()


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("kept", [(0, 2), (0, 1, 2)], ids=str)
def test_decoding_with_a_cache_equals_the_full_forward(name: str, kept: tuple[int, ...]) -> None:
    case = CASES[name]
    model = case.build()
    apply_structure(model, plan_for(model, heads=True, uneven=True))
    decoder = bind(model).stacks[-1]
    apply_structure(model, Plan(model.config.model_type, {decoder.name: StackPlan(kept)}))

    inputs = case.inputs()
    key = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    ids = inputs.pop(key)
    with torch.no_grad():
        full = model(**inputs, **{key: ids}).logits
        first = model(**inputs, **{key: ids[:, :4]}, use_cache=True)
        assert len(first.past_key_values.self_attention_cache.layers) >= len(kept)
        rest = model(**inputs, **{key: ids[:, 4:]}, past_key_values=first.past_key_values, use_cache=True).logits
    assert_near([torch.cat([first.logits, rest], dim=1)], [full])


@pytest.mark.parametrize("name", ["whisper", "t5", "bart"])
@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_generate_works_where_one_stack_is_shorter(name: str, stack: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = case.build()
    apply_structure(model, Plan(model.config.model_type, {stack: StackPlan((0, 2))}))
    model.save_pretrained(tmp_path)
    inputs = {k: v for k, v in case.inputs().items() if k != "decoder_input_ids"}
    start = torch.tensor([[model.config.decoder_start_token_id, 7]]).expand(len(next(iter(inputs.values()))), -1)
    found = []
    for generator, cache in ((model, True), (model, False), (type(model).from_pretrained(tmp_path), True)):
        settings = GenerationConfig(max_new_tokens=5, min_new_tokens=5, use_cache=cache, pad_token_id=0, eos_token_id=2)
        # Whisper wraps this in one of its own, for recordings of any length.
        found.append(GenerationMixin.generate(generator, **inputs, decoder_input_ids=start, generation_config=settings))
    assert found[0].shape[1] == 7
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("name", ["bert", "distilbert_classifier", "modernbert_masked_lm", "clip", "whisper", "bart"])
def test_removing_heads_is_uneven_where_the_head_size_comes_from_their_number(name: str) -> None:
    model = CASES[name].build()
    config = model.config.to_dict()
    plan = plan_for(model, heads=True, uneven=False)
    heads_only = {
        name: replace(stack, blocks={i: replace(block, channels=None) for i, block in stack.blocks.items()})
        for name, stack in plan.stacks.items()
    }
    apply_structure(model, replace(plan, stacks=heads_only))
    assert is_uneven(model)
    assert {k: v for k, v in model.config.to_dict().items() if k != "hf_shrink"} == config


@every_case
def test_gradients_reach_what_they_reached_in_the_dense_model(case: Case) -> None:
    reached = []
    for cut in (False, True):
        model = case.build()
        if cut:
            apply_structure(model, plan_for(model, heads=True, uneven=True))
        results = [value for value in model(**case.inputs()).values() if isinstance(value, Tensor)]
        torch.stack([value.square().mean() for value in results]).sum().backward()
        reached.append({n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0})
    assert reached[0] == reached[1]
    inside = {f"{path}.weight" for block in bind(model).blocks for path in block.roles}
    assert reached[1] >= inside


@every_case
def test_the_walk_reproduces_the_hidden_states(case: Case) -> None:
    model = case.build()
    batches = [case.inputs(), {k: v[:1] for k, v in case.inputs().items()}]
    for stack in bind(model).stacks:
        seen: list[list[Tensor]] = [[] for _ in batches]
        for number, batch in enumerate(batches):
            hooks = [
                block.module.register_forward_hook(
                    lambda _, __, out, keep=seen[number]: keep.append(out[0] if isinstance(out, tuple) else out)
                )
                for block in stack.blocks
            ]
            outputs(model, batch)
            for hook in hooks:
                hook.remove()
        walk = StackWalk(model, [block.module for block in stack.blocks], batches)
        for block in stack.blocks:
            matrices = {path: model.get_submodule(path) for path in block.roles}
            assert set(walk.statistics(matrices)) == set(matrices)
            walk.advance()
            for number in range(len(batches)):
                assert torch.allclose(walk.hidden[number], seen[number][block.index], atol=1e-6)


@pytest.mark.parametrize("name", ["t5", "bart", "bert"])
def test_statistics_count_the_real_tokens_of_the_side_they_come_from(name: str) -> None:
    """Encoder and decoder inputs of one length, padded differently: neither may use the other's mask."""
    model = CASES[name].build()
    inputs = CASES["bert"].inputs()
    encoder_mask = inputs["attention_mask"].bool()
    decoder_mask = encoder_mask.flip(0)
    decoder_mask[0, :] = True
    if name != "bert":
        inputs["decoder_input_ids"] = inputs["input_ids"].flip(0)
        inputs["decoder_attention_mask"] = decoder_mask.long()
    assert encoder_mask.sum() != decoder_mask.sum()
    for stack in bind(model).stacks:
        block = stack.blocks[0]
        seen: dict[str, Tensor] = {}
        hooks = [
            model.get_submodule(path).register_forward_pre_hook(
                lambda _, args, p=path, keep=seen: keep.update({p: args[0]})
            )
            for path in block.roles
        ]
        outputs(model, inputs)
        for hook in hooks:
            hook.remove()
        walk = StackWalk(model, [b.module for b in stack.blocks], [inputs])
        own = decoder_mask if stack.name == "decoder" else encoder_mask
        assert walk.tokens == own.sum()
        for path, statistics in walk.statistics({path: model.get_submodule(path) for path in block.roles}).items():
            cross = block.cross_attention
            reads_encoder = cross is not None and path in (cross.slot("key").path, cross.slot("value").path)
            rows = seen[path][encoder_mask if reads_encoder else own].double()
            assert statistics.tokens == len(rows)
            assert torch.allclose(statistics.hessian.double(), rows.T @ rows, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["t5", "clip", "bart", "modernbert_masked_lm"])
def test_blocks_taken_out_for_a_measurement_come_back(name: str) -> None:
    case = CASES[name]
    model = case.build()
    inputs = model_inputs(model, case.inputs())  # without a KV cache
    dense, config = outputs(model, inputs), model.config.to_dict()
    for stack in bind(model).stacks:
        reference = copy.deepcopy(model)
        bypass(bind(reference).stack(stack.name), {1})
        with without_blocks(model, stack, [1]):
            assert_near(outputs(model, inputs), outputs(reference, inputs), tolerance=1e-6)
    assert model.config.to_dict() == config
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, inputs), dense, strict=True))


def test_a_shared_position_bias_wants_the_same_heads_in_every_block() -> None:
    model = CASES["t5"].build()
    plan = Plan("t5", {"encoder": StackPlan((0, 1, 2), {1: BlockPlan(query_heads=(0, 1, 2))})})
    with pytest.raises(ArchitectureError, match="same heads"):
        apply_structure(model, plan)


def test_the_parts_around_the_blocks_are_left_alone() -> None:
    for name, parts in {
        "bert_classifier": ("bert.pooler.dense", "classifier"),
        "vit": ("pooler.dense",),
        "clip": ("text_projection", "visual_projection"),
        "whisper": ("proj_out",),
    }.items():
        model = CASES[name].build()
        before = {part: model.get_submodule(part).weight.clone() for part in parts}
        inside = {path for block in bind(model).blocks for path in block.roles}
        assert not inside & set(parts)
        apply_structure(model, plan_for(model, heads=True, uneven=True))
        assert all(torch.equal(model.get_submodule(part).weight, weight) for part, weight in before.items())
