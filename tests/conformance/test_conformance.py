"""Decoders: cutting a model does what masking it does, for every family, uniform and uneven."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.cases import CASES, Case
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_shrink.architectures import bind
from hf_shrink.architectures.bound import BoundStack
from hf_shrink.architectures.linears import is_matrix, matrix
from hf_shrink.calibration.walk import StackWalk
from hf_shrink.checkpoint.quantizers import register
from hf_shrink.checkpoint.save import save_model
from hf_shrink.errors import ArchitectureError
from hf_shrink.plan import BlockPlan, Plan, StackPlan
from hf_shrink.surgery import apply_structure, is_uneven, without_blocks

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
GENERATING = {name: case for name, case in CASES.items() if name != "llama_classifier"}


def plan_for(model: PreTrainedModel, case: Case, uneven: bool, blocks: tuple[int, ...] = (0, 1, 2, 3)) -> Plan:
    """Other units in every block; the same number of them, or other numbers too. Block 3 stays whole when uneven."""
    stack = bind(model).stack(case.stack)
    plans = {}
    for index in blocks:
        block = stack.blocks[index]
        groups, each = block.attention.kv_heads, block.attention.heads_per_group
        if uneven and index == 3:
            continue
        if not uneven:  # four of six heads: two groups of two where there are three
            groups, each = {3: (2, 2), 6: (4, 1), 1: (1, 4)}[groups]
        else:
            groups, each = {
                3: [(2, 2), (3, 1), (1, 1)],
                6: [(5, 1), (3, 1), (1, 1)],
                1: [(1, 5), (1, 3), (1, 1)],
            }[groups][index]
        # Uniform heads are asked for only where stock can say them, so that the uniform plan stays uniform.
        heads = not case.fixed_heads and (uneven or case.portable_heads)
        channels = 50 if not uneven else 70 - 9 * index
        plans[index] = BlockPlan(
            query_heads=kept_heads(block.attention, groups, each, first=index) if heads else None,
            channels=tuple(sorted((11 * i + index) % block.mlp.channels for i in range(channels))),
        )
    return Plan(model.config.model_type, {case.stack: StackPlan(blocks, plans)})


def kept_heads(attention: Any, groups: int, each: int, first: int) -> tuple[int, ...]:
    kept = sorted((first + i) % attention.kv_heads for i in range(groups))
    size = attention.heads_per_group
    return tuple(group * size + head for group in kept for head in sorted((first + j) % size for j in range(each)))


def masked(model: PreTrainedModel, case: Case, plan: Plan) -> PreTrainedModel:
    """A copy of the dense model with zero columns where units go, and blocks that only hand their input on."""
    model = copy.deepcopy(model)
    stack, wanted = bind(model).stack(case.stack), plan.stacks[case.stack]
    for block in stack.blocks:
        kept = wanted.blocks.get(block.index, BlockPlan())
        if kept.query_heads is not None:
            columns = matrix(block.module.get_submodule(block.attention.spec.output))
            size = block.attention.head_size
            for head in set(range(block.attention.heads)) - set(kept.query_heads):
                columns[:, head * size : (head + 1) * size] = 0
        if kept.channels is not None:
            columns = matrix(block.module.get_submodule(block.mlp.spec.down))
            columns[:, [c for c in range(block.mlp.channels) if c not in kept.channels]] = 0
    bypass(stack, set(range(len(stack.blocks))) - set(wanted.kept))
    return model


def bypass(stack: BoundStack, removed: set[int]) -> None:
    for index in removed:
        block = stack.blocks[index].module

        def forward(hidden: Tensor, *args: Any, real: Any = block.forward, **kwargs: Any) -> Any:
            output = real(hidden, *args, **kwargs)
            return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

        block.forward = forward


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert actual.shape == expected.shape
    assert float((actual - expected).abs().max()) <= tolerance * float(expected.abs().max())


def config_of(model: PreTrainedModel) -> dict[str, Any]:
    return {key: value for key, value in model.config.to_dict().items() if key != "hf_shrink"}


def same_config(loaded: PreTrainedModel, saved: PreTrainedModel) -> bool:
    """Equal but for what loading itself notes."""

    def plain(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {k: plain(v) for k, v in value.items() if k not in ("_name_or_path", "dtype", "architectures")}

    return plain(config_of(loaded)) == plain(config_of(saved))


@every_case
def test_a_plan_that_keeps_everything_changes_nothing(case: Case) -> None:
    model = case.build()
    before, config = copy.deepcopy(model.state_dict()), config_of(model)
    dense = logits(model, case.inputs())
    blocks = {
        block.index: BlockPlan(tuple(range(block.attention.heads)), tuple(range(block.mlp.channels)))
        for block in bind(model).stack(case.stack).blocks
    }
    apply_structure(model, Plan(model.config.model_type, {case.stack: StackPlan((0, 1, 2, 3), blocks)}))
    assert not is_uneven(model) and config_of(model) == config
    assert model.config.hf_shrink == {"format": 1, "shapes": {}, "attributes": {}}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model, case.inputs()), dense)


def cut_like_masked(case: Case, uneven: bool, blocks: tuple[int, ...] = (0, 1, 2, 3)) -> PreTrainedModel:
    """A cut model, which says what the masked one does and has the parameters that were predicted."""
    model = case.build()
    dense = copy.deepcopy(model)
    plan = plan_for(model, case, uneven, blocks)
    reference = masked(model, case, plan)
    predicted = predicted_parameters(model, case, plan)

    apply_structure(model, plan)
    for inputs in (case.inputs(), case.padded()):
        cut, expected = logits(model, inputs), logits(reference, inputs)
        assert_near(cut, expected)
        assert not torch.allclose(cut, logits(dense, inputs), atol=1e-2)
    assert sum(p.numel() for p in model.parameters()) == predicted
    assert is_uneven(model) == (uneven or not case.portable_channels)
    return model


@every_case
@pytest.mark.parametrize(("uneven", "blocks"), [(False, (1, 3)), (True, (0, 2, 3))], ids=["uniform", "uneven"])
def test_cut_equals_masked_and_loads_again(case: Case, uneven: bool, blocks: tuple[int, ...], tmp_path: Path) -> None:
    model = cut_like_masked(case, uneven, blocks)
    if is_uneven(model):
        register()
        save_model(model, tmp_path)
    else:  # stock's own, which knows nothing of us
        model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert same_config(loaded, model) and loaded.config.hf_shrink == model.config.hf_shrink
    assert torch.equal(logits(loaded, case.padded()), logits(model, case.padded()))


def predicted_parameters(model: PreTrainedModel, case: Case, plan: Plan) -> int:
    total = sum(p.numel() for p in model.parameters())
    wanted = plan.stacks[case.stack]
    for block in bind(model).stack(case.stack).blocks:
        if block.index not in wanted.kept:
            total -= block.parameters
            continue
        kept, attention = wanted.blocks.get(block.index, BlockPlan()), block.attention
        if kept.query_heads is not None:
            groups = len(attention.groups_of(kept.query_heads))
            total -= (attention.kv_heads - groups) * attention.group_parameters
            total -= (groups * attention.heads_per_group - len(kept.query_heads)) * attention.head_parameters
        if kept.channels is not None:
            total -= (block.mlp.channels - len(kept.channels)) * block.mlp.channel_parameters
    return total


@pytest.mark.parametrize("case", GENERATING.values(), ids=GENERATING.keys())
@pytest.mark.parametrize(("uneven", "blocks"), [(False, (1, 3)), (True, (0, 2, 3))], ids=["uniform", "uneven"])
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_decoding_with_a_cache_equals_the_full_forward(case: Case, uneven: bool, blocks: tuple[int, ...]) -> None:
    model = case.build()
    apply_structure(model, plan_for(model, case, uneven, blocks))
    ids = case.inputs()["input_ids"]
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        first = model(ids[:, :8], use_cache=True)
        parts = [first.logits]
        for position in range(8, ids.shape[1]):
            step = model(ids[:, position : position + 1], past_key_values=first.past_key_values, use_cache=True)
            parts.append(step.logits)
        assert len(first.past_key_values.layers) == len(blocks)
        assert_near(torch.cat(parts, dim=1), full)

        settings = {"do_sample": False, "max_new_tokens": 3, "min_new_tokens": 3}
        mask = torch.ones_like(ids)
        cached = model.generate(ids, attention_mask=mask, use_cache=True, **settings)
        assert torch.equal(cached, model.generate(ids, attention_mask=mask, use_cache=False, **settings))


@every_case
def test_where_all_blocks_stay_gradients_reach_every_weight(case: Case) -> None:
    cut_like_masked(case, uneven=False)
    model = cut_like_masked(case, uneven=True)
    model(**case.inputs()).logits.square().sum().backward()
    for block in bind(model).stack(case.stack).blocks:
        for name, parameter in block.module.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, f"{block.path}.{name}"


@every_case
def test_the_walk_reproduces_hidden_states_and_second_moments(case: Case) -> None:
    model = case.build()
    batches = [case.padded(), case.inputs()]
    stack = bind(model).stack(case.stack)
    paths = [path for block in stack.blocks for path in block.roles]
    outputs: dict[str, list[Tensor]] = {block.path: [] for block in stack.blocks}
    moments = {path: torch.zeros(()) for path in paths}
    tokens = dict.fromkeys(paths, 0)

    def keep(path: str) -> Any:
        return lambda _, __, out: outputs[path].append(out if isinstance(out, Tensor) else out[0])

    def add(path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1]).double()[real]
            moments[path] = moments[path] + x.T @ x
            tokens[path] += len(x)

        return hook

    hooks = [block.module.register_forward_hook(keep(block.path)) for block in stack.blocks]
    hooks += [model.get_submodule(path).register_forward_pre_hook(add(path)) for path in paths]
    for batch in batches:
        real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool().reshape(-1)
        logits(model, batch)
    for hook in hooks:
        hook.remove()

    walk = StackWalk(model, [block.module for block in stack.blocks], batches)
    assert walk.tokens == 5 + 9 + 12 + 22
    for block in stack.blocks:
        found = walk.statistics({path: model.get_submodule(path) for path in block.roles})
        assert set(found) == set(block.roles)
        for path, statistics in found.items():
            assert statistics.tokens == tokens[path] == walk.tokens
            assert (statistics.hessian - moments[path]).norm() <= 1e-4 * moments[path].norm()
        shared = {id(found[path]) for path, roles in block.roles.items() if {"query", "key", "value"} & set(roles)}
        assert len(shared) == 1
        walk.advance()
        assert all(torch.equal(a, b) for a, b in zip(walk.hidden, outputs[block.path], strict=True))


@every_case
def test_blocks_taken_out_for_a_measurement_come_back(case: Case) -> None:
    model = case.build()
    dense, config = logits(model, case.inputs()), config_of(model)
    reference = copy.deepcopy(model)
    bypass(bind(reference).stack(case.stack), {0, 2})
    with without_blocks(model, bind(model).stack(case.stack), [0, 2]):
        assert_near(logits(model, case.padded()), logits(reference, case.padded()))
    assert config_of(model) == config
    assert torch.equal(logits(model, case.inputs()), dense)


@every_case
def test_every_matrix_of_a_block_has_a_role(case: Case) -> None:
    model = case.build()
    stack = bind(model).stack(case.stack)
    for block in stack.blocks:
        inside = {f"{block.path}.{name}" for name, module in block.module.named_modules() if is_matrix(module)}
        assert set(block.roles) == inside and all(block.roles.values())
    stack.blocks[1].module.extra = nn.Linear(48, 48)
    with pytest.raises(ArchitectureError, match=r"1\.extra has no role"):
        bind(model)


@every_case
def test_a_missing_or_wrong_matrix_is_named(case: Case) -> None:
    model = case.build()
    block = bind(model).stack(case.stack).blocks[2]
    down = block.attention.spec.output
    owner, _, name = down.rpartition(".")
    delattr(block.module.get_submodule(owner), name)
    with pytest.raises(ArchitectureError, match=rf"'output' is missing: .*\.2 has no module '{down}'"):
        bind(model)
    setattr(
        block.module.get_submodule(owner), name, nn.Linear(block.attention.heads * block.attention.head_size - 1, 48)
    )
    with pytest.raises(ArchitectureError, match=r"\.2"):
        bind(model)


@pytest.mark.parametrize("name", ["falcon_alibi", "bloom"])
def test_heads_with_a_slope_of_their_own_stay(name: str) -> None:
    model = CASES[name].build()
    plan = Plan(model.config.model_type, {"decoder": StackPlan((0, 1, 2, 3), {1: BlockPlan(query_heads=(0, 1, 2))})})
    with pytest.raises(ArchitectureError, match="ALiBi"):
        apply_structure(model, plan)
