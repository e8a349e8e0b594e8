"""Mixtures of experts: every expert is quantized on what it sees, saved under its own names and loaded again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.cases import tokens
from conformance.cases_mixtures import MIXTURES, count_of, data, names_of
from safetensors import safe_open
from tiny import QUICK_GPTQ
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_shrink import make_plan, shrink
from hf_shrink.architectures import bind
from hf_shrink.architectures.inspect import describe
from hf_shrink.calibration import shelf
from hf_shrink.calibration.walk import StackWalk
from hf_shrink.errors import ArchitectureError
from hf_shrink.plan import BlockPlan, Plan, StackPlan
from hf_shrink.runtime import CompressedLinear
from hf_shrink.runtime.experts import SeparateExperts, separate_experts
from hf_shrink.surgery import apply_structure

every_mixture = pytest.mark.parametrize("name", MIXTURES)
GPTQ = {"quantize": {**QUICK_GPTQ, "scheme": "W8A16", "group_size": 16}}
RTN = {"quantize": {"method": "rtn", "scheme": "W4A16", "group_size": 16}}


def logits(model: nn.Module, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def sparse_blocks(model: PreTrainedModel) -> list[Any]:
    return [block for block in bind(model).blocks if block.experts is not None]


@every_mixture
def test_experts_that_are_apart_compute_the_same_and_go_back(name: str) -> None:
    model = MIXTURES[name]()
    inputs = {"input_ids": tokens(3, 14)}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    whole = logits(model, **inputs)
    undo = separate_experts(model)
    assert any(isinstance(module, SeparateExperts) for module in model.modules())
    assert relative(logits(model, **inputs), whole) < 1e-5
    undo()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(logits(model, **inputs), whole)


@every_mixture
def test_roles_of_experts_and_routers(name: str) -> None:
    model = MIXTURES[name]()
    gate, up, down = names_of(name)
    whole = {block.path: block for block in bind(model).blocks}
    separate_experts(model)
    blocks = sparse_blocks(model)
    assert len(blocks) == (1 if "qwen" in name else 2)
    for block in blocks:
        assert f"{block.path}.mlp.gate" in block.routers
        assert block.experts.count == count_of(name) == whole[block.path].experts.count
        assert block.experts.shapes == whole[block.path].experts.shapes
        for expert in range(block.experts.count):
            for role, own in (("gate", gate), ("up", up), ("down", down)):
                path = f"{block.path}.mlp.experts.{expert}.{own}"
                assert block.roles[path] == (role,)
                linear = model.get_submodule(path)
                assert (linear.out_features, linear.in_features) == block.experts.shapes[role]
    if name == "qwen2_moe":
        assert blocks[0].roles["model.layers.0.mlp.shared_expert_gate"] == ("router",)


@every_mixture
def test_statistics_of_an_expert_are_of_the_real_tokens_that_came_to_it(name: str) -> None:
    model = MIXTURES[name]()
    separate_experts(model)
    stack = bind(model).stack("decoder")
    batches = data(4)
    moments: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    outputs: dict[str, list[Tensor]] = {block.path: [] for block in stack.blocks}
    masks = [batch["attention_mask"].bool() for batch in batches]

    def reference(path: str, module: SeparateExperts) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> None:
            hidden, index, _ = args
            for expert in range(module.num_experts):
                x = hidden[(index == expert).any(1) & mask.reshape(-1)].double()
                gate, up = (module.matrix(expert, role).weight.double() for role in ("gate", "up"))
                middle = nn.functional.silu(x @ gate.T) * (x @ up.T)
                for role, own in module.names.items():
                    seen = middle if role == "down" else x
                    key = f"{path}.{expert}.{own}"
                    moments[key] = moments.get(key, 0) + seen.T @ seen
                    counts[key] = counts.get(key, 0) + len(seen)

        return hook

    hooks = [
        block.experts.module.register_forward_pre_hook(reference(block.experts.path, block.experts.module))
        for block in stack.blocks
        if block.experts is not None
    ]
    for block in stack.blocks:
        hooks.append(block.module.register_forward_hook(lambda _, __, out, p=block.path: outputs[p].append(out)))
    for batch, mask in zip(batches, masks, strict=True):  # noqa: B007 - the hooks read `mask`
        logits(model, **batch)
    for hook in hooks:
        hook.remove()

    for staged in (False, True):
        walk = StackWalk(model, [block.module for block in stack.blocks], batches)
        for block in stack.blocks:
            matrices = {path: model.get_submodule(path) for path, roles in block.roles.items() if roles != ("router",)}
            found: dict[str, Any] = {}
            if staged:
                assert walk.advance_in_stages(matrices, found.update, model.get_submodule) is not None
            else:
                found = walk.statistics(matrices)
                walk.advance()
            assert found.keys() == matrices.keys()
            for path in set(moments) & set(matrices):
                assert found[path].tokens == counts[path]
                assert relative(found[path].hessian.double(), moments[path]) < 1e-4
            others = [found[path] for path in matrices if path not in moments]
            assert {statistics.tokens for statistics in others} == {walk.tokens}
            for hidden, output, mask in zip(walk.hidden, outputs[block.path], masks, strict=True):
                assert relative(hidden[mask], output[mask]) < 1e-5
    assert len(set(counts.values())) > 2 and counts.keys() == moments.keys()  # experts really differ


@every_mixture
def test_quantized_saved_and_loaded(name: str, tmp_path: Path) -> None:
    dense = MIXTURES[name]()
    model: Any = shrink(copy.deepcopy(dense), {"steps": [GPTQ]}, calibration=data(), progress=False)
    report = model.shrink_report
    assert report.portable and report.parameters_before == report.parameters_after
    assert report.bytes_after < report.bytes_before / 1.5
    gate, up, down = names_of(name)
    for block in sparse_blocks(model):
        for path in block.experts.matrices:
            assert isinstance(model.get_submodule(path), CompressedLinear), path
        for router in block.routers:
            assert not isinstance(model.get_submodule(router), CompressedLinear)
    held_out = {"input_ids": tokens(4, 20, seed=99)}
    after = logits(model, **held_out)
    assert 0 < relative(after, logits(dense, **held_out)) < 0.3

    model.save_pretrained(tmp_path / "one")
    with safe_open(tmp_path / "one" / "model.safetensors", "pt") as file:
        stored = {key: list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    around = "block_sparse_moe" if name == "mixtral" else "mlp"
    for own in (gate, up, down):
        start = f"model.layers.0.{around}.experts.{count_of(name) - 1}.{own}"
        assert {f"{start}.weight_packed", f"{start}.weight_scale", f"{start}.weight_shape"} <= stored.keys()
        assert f"{start}.weight" not in stored
    assert f"model.layers.0.{around}.gate.weight" in stored
    assert not [key for key in stored if "gate_up_proj" in key]

    loaded = type(model).from_pretrained(tmp_path / "one").eval()
    assert torch.equal(logits(loaded, **held_out), after)
    loaded.save_pretrained(tmp_path / "two")
    again = type(model).from_pretrained(tmp_path / "two").eval()
    assert torch.equal(logits(again, **held_out), after)
    assert (tmp_path / "one" / "config.json").read_text() == (tmp_path / "two" / "config.json").read_text()


@every_mixture
def test_batches_that_wait_in_a_file_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "SMALLEST", 1)
    states = []
    for room in (1 << 30, 0):
        monkeypatch.setattr(shelf, "IN_MEMORY", room)
        states.append(shrink(MIXTURES[name](), {"steps": [GPTQ]}, calibration=data(), progress=False).state_dict())
    inside, outside = states
    assert inside.keys() == outside.keys()
    assert all(torch.equal(tensor, outside[key]) for key, tensor in inside.items())


@every_mixture
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_decoding_with_a_cache(name: str) -> None:
    dense = MIXTURES[name]()
    model: Any = shrink(copy.deepcopy(dense), {"steps": [RTN]}, progress=False)
    report = model.shrink_report
    assert report.portable and report.bytes_after < report.bytes_before / 1.9
    ids = tokens(2, 12)
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        assert 0 < relative(full, logits(dense, input_ids=ids)) < 1.0
        first = model(ids[:, :8], use_cache=True)
        parts = [first.logits]
        for position in range(8, 12):
            step = model(ids[:, position : position + 1], past_key_values=first.past_key_values, use_cache=True)
            parts.append(step.logits)
        assert relative(torch.cat(parts, dim=1), full) < 1e-5
        settings = {
            "do_sample": False,
            "max_new_tokens": 4,
            "min_new_tokens": 4,
            "attention_mask": torch.ones_like(ids),
        }
        cached = model.generate(ids, use_cache=True, **settings)
        assert torch.equal(cached, model.generate(ids, use_cache=False, **settings))


@every_mixture
def test_planning_leaves_the_model_alone_and_inspect_shows_the_experts(name: str) -> None:
    model = MIXTURES[name]()
    keys = list(model.state_dict())
    plan = make_plan(model, {"steps": [RTN]}, progress=False)
    assert list(model.state_dict()) == keys
    assert sum(".experts." in path for path in plan.schemes) == 3 * count_of(name) * len(sparse_blocks(model))
    assert Plan.from_json(plan.to_json()) == plan
    gate, _, _ = names_of(name)
    description = describe(model)
    text = description.to_text()
    assert f"mlp.experts.*.{gate} (gate, {count_of(name)} experts)" in text
    assert f"{count_of(name)} experts of" in text and "experts: any number, portable" in text
    assert "channels of experts: multiples of 8 stay, of all experts of a block as many, portable" in text
    assert sum(row[2] for row in description.rows()[:-1] if not row[0].startswith(" ")) == description.parameters
    undo = separate_experts(model)
    assert describe(model) == description
    undo()


def test_a_plan_cannot_cut_channels_of_an_mlp_that_is_not_there() -> None:
    plan = Plan("mixtral", {"decoder": StackPlan((0, 1), {0: BlockPlan(channels=(0, 1))})})
    with pytest.raises(ArchitectureError, match="no MLP whose channels"):
        apply_structure(MIXTURES["mixtral"](), plan)


def test_blocks_go_where_their_kind_does_not_depend_on_their_number(tmp_path: Path) -> None:
    depth = {"prune": {"what": "depth", "method": "block_influence", "blocks": 1}}
    for build in (MIXTURES["mixtral"], lambda: MIXTURES["qwen3_moe"](mlp_only_layers=[])):
        model: Any = shrink(build(), {"steps": [depth, GPTQ]}, calibration=data(), progress=False)
        assert model.config.num_hidden_layers == 1 and model.shrink_report.portable
        folder = tmp_path / model.config.model_type
        model.save_pretrained(folder)
        ids = tokens(2, 9)
        loaded = type(model).from_pretrained(folder)
        assert torch.equal(logits(loaded, input_ids=ids), logits(model, input_ids=ids))
    with pytest.raises(ArchitectureError, match="follows from their numbers"):
        apply_structure(MIXTURES["qwen3_moe"](), Plan("qwen3_moe", {"decoder": StackPlan((0,))}))


def test_a_table_that_does_not_fit_is_named() -> None:
    model = MIXTURES["mixtral"]()
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = nn.Parameter(torch.zeros(4, 48, 79))
    with pytest.raises(ArchitectureError, match=r"layers\.1\.mlp\.experts: gate_up_proj \(4, 160, 48\)"):
        bind(model)
    del experts.gate_up_proj
    with pytest.raises(ArchitectureError, match="neither the parameter 'gate_up_proj' nor experts"):
        bind(model)
