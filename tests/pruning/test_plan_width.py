"""Width plans on real, tiny models: which units stay, and whether it is as much as was asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from conformance.cases import CASES as DECODERS
from conformance.cases_encoders import CASES as OTHERS
from tiny import VOCABULARY, tiny_llama, tiny_unknown
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_shrink.architectures import bind
from hf_shrink.errors import ArchitectureError, CalibrationError, RecipeError
from hf_shrink.plan import BlockPlan, Plan, StackPlan
from hf_shrink.pruning.base import WIDTH
from hf_shrink.pruning.plan_width import WidthPlan, plan_width
from hf_shrink.recipe import PruneStep
from hf_shrink.surgery import apply_structure, is_uneven

CASES = {**{f"decoder_{name}": case for name, case in DECODERS.items()}, **OTHERS}


def tokens(batches: int = 2, rows: int = 4, length: int = 24) -> list[dict[str, Tensor]]:
    return [{"input_ids": torch.randint(3, VOCABULARY, (rows, length))} for _ in range(batches)]


def planned(model: nn.Module, ratio: float, method: str = "wanda", batches: Any = None, **kw: Any) -> WidthPlan:
    portable = kw.pop("portable", True)
    step = PruneStep("width", method, ratio=ratio, **kw)
    batches = tokens() if batches is None else batches
    return plan_width(model, bind(model), step, WIDTH.build(method, {}), batches, portable=portable)


def cut(model: PreTrainedModel, blocks: Mapping[tuple[str, int], BlockPlan]) -> None:
    binding = bind(model)
    stacks = {
        stack.name: StackPlan(
            tuple(range(len(stack.blocks))), {i: plan for (name, i), plan in blocks.items() if name == stack.name}
        )
        for stack in binding.stacks
    }
    apply_structure(model, Plan(binding.model_type, stacks))


def parameters(model: nn.Module) -> int:
    return sum(stack.parameters for stack in bind(model).stacks)


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
@pytest.mark.parametrize("portable", [True, False])
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.55])
def test_as_many_parameters_leave_as_were_asked(method: str, portable: bool, ratio: float) -> None:
    model = tiny_llama()
    before = parameters(model)
    plan = planned(model, ratio, method, portable=portable)
    assert parameters(model) == before, "planning changes nothing"
    cut(model, plan.blocks)
    assert 1 - parameters(model) / before == pytest.approx(ratio, abs=0.01)
    assert not (portable and is_uneven(model))
    assert torch.isfinite(model(**tokens()[0]).logits).all()


@pytest.mark.parametrize(("portable", "ratio"), [(True, 0.15), (False, 0.3)])
@pytest.mark.parametrize("name", sorted(CASES))
def test_every_family_runs_after_losing_some(name: str, portable: bool, ratio: float) -> None:
    """Portable plans leave a config that stock can build; the ratio is met or the plan says why not."""
    model, inputs = CASES[name].build(), CASES[name].inputs()
    before = parameters(model)
    if portable and name == "decoder_bloom":  # neither its heads nor its channels have a config key
        with pytest.raises(RecipeError, match=r"ALiBi.*portable: false"):
            planned(model, ratio, "magnitude", [inputs], portable=portable)
        return
    plan = planned(model, ratio, "magnitude", [inputs], portable=portable)
    cut(model, plan.blocks)
    removed = 1 - parameters(model) / before
    assert removed == pytest.approx(ratio, abs=0.012) or any("coarser" in note for note in plan.notes)
    assert ratio - 0.1 < removed < ratio + 0.1
    assert not (portable and is_uneven(model)), plan
    with torch.no_grad():
        model(**inputs)


@pytest.mark.parametrize("name", ["t5", "clip", "whisper", "decoder_phi3"])
def test_statistics_are_taken_in_every_kind_of_stack(name: str) -> None:
    if name not in CASES:
        pytest.fail(f"{name} is gone from the conformance cases; have {sorted(CASES)}")
    model, inputs = CASES[name].build(), CASES[name].inputs()
    before = parameters(model)
    first, second = (planned(model, 0.3, "wanda", [inputs, inputs], portable=False) for _ in range(2))
    assert first == second
    cut(model, first.blocks)
    assert 1 - parameters(model) / before == pytest.approx(0.3, abs=0.05)


def test_idle_units_are_the_ones_that_go() -> None:
    """Units whose columns are zero: every method sees them, and 20% of the block is just what they are."""
    for method in ("magnitude", "wanda"):
        model = tiny_llama()
        idle = [3, 8, 9, 40, 77]
        for layer in model.model.layers:
            for weight in (layer.mlp.down_proj.weight, layer.mlp.gate_proj.weight.T, layer.mlp.up_proj.weight.T):
                weight.data[:, idle] = 0
        size = bind(model).blocks[0].mlp.channel_parameters * len(idle) / bind(model).blocks[0].parameters
        plan = planned(model, size, method, units="mlp")
        for block in plan.blocks.values():
            assert set(range(80)) - set(block.channels or ()) == set(idle)


def test_wanda_looks_at_activations_where_magnitude_does_not() -> None:
    """A channel with large weights whose input is always zero."""
    model = tiny_llama()
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data[:, 7] *= 20
        layer.mlp.up_proj.weight.data[7] = 0
    for method, found in (("wanda", False), ("magnitude", True)):
        plan = planned(model, 0.05, method, units="mlp")
        assert [7 in (block.channels or ()) for block in plan.blocks.values()] == [found] * 4


def test_uneven_takes_more_from_a_useless_block() -> None:
    model = tiny_llama()
    useless = model.model.layers[2]
    useless.mlp.down_proj.weight.data.zero_()
    useless.self_attn.o_proj.weight.data.zero_()
    plan = planned(model, 0.3, portable=False)
    left = {
        block: (len(p.channels or range(80)), len(p.query_heads or range(6))) for (_, block), p in plan.blocks.items()
    }
    assert left[2] == (16, 2)
    assert all(channels > 16 for block, (channels, _) in left.items() if block != 2)


def test_a_depth_pruned_binding_counts_only_what_is_left() -> None:
    from hf_shrink.surgery import without_blocks

    model, source = tiny_llama(), bind(tiny_llama())
    with without_blocks(model, bind(model).stacks[0], [1]):
        plan = planned(model, 0.3)
    assert sorted(plan.blocks) == [("decoder", 0), ("decoder", 1), ("decoder", 2)]
    assert len(source.stacks[0].blocks) == 4


def test_padding_does_not_count() -> None:
    torch.manual_seed(0)
    ids, mask = torch.randint(3, VOCABULARY, (2, 12)), torch.ones(2, 12, dtype=torch.long)
    mask[:, 6:] = 0
    padded = [{"input_ids": ids, "attention_mask": mask}]
    other = [{"input_ids": torch.where(mask.bool(), ids, ids.flip(0)), "attention_mask": mask}]
    assert planned(tiny_llama(), 0.3, batches=padded) == planned(tiny_llama(), 0.3, batches=other)


def test_a_bfloat16_model_is_planned_in_float32_and_left_as_it_was() -> None:
    model = tiny_llama().bfloat16()
    twin = tiny_llama().bfloat16().float()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = tokens()
    # Embeddings run in bfloat16 in both, so blocks get the same inputs.
    plan = planned(model, 0.2, batches=data)
    assert plan.blocks == planned(twin, 0.2, batches=data).blocks
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])


def test_heads_of_a_family_that_derives_the_head_size_stay_when_portable() -> None:
    case = OTHERS["bert_classifier"]
    model, inputs = case.build(), [case.inputs()]
    plan = planned(model, 0.2, batches=inputs)
    assert all(p.query_heads is None and p.channels for p in plan.blocks.values())
    assert "derives the head size" in plan.notes[0] and "portable: false" in plan.notes[0]
    with pytest.raises(RecipeError, match="set portable: false to remove heads"):
        planned(model, 0.2, batches=inputs, units="attention")
    uneven = planned(model, 0.2, batches=inputs, units="attention", portable=False)
    assert uneven.blocks and all(p.channels is None for p in uneven.blocks.values())


def test_an_uneven_model_stays_as_it_is_when_portable() -> None:
    model = tiny_llama()
    cut(model, {("decoder", 1): BlockPlan(channels=tuple(range(40)))})
    plan = planned(model, 0.1, "magnitude")
    assert "differ in size already" in plan.notes[0]
    assert all(p.channels is None for p in plan.blocks.values())


def test_tied_stacks_keep_the_same_heads_in_all_blocks() -> None:
    for portable in (True, False):
        case = OTHERS["t5"]
        plan = planned(case.build(), 0.3, batches=[case.inputs()], units="attention", portable=portable)
        for stack in ("encoder", "decoder"):
            kept = {p.query_heads for (name, _), p in plan.blocks.items() if name == stack}
            assert len(kept) <= 1
        assert plan.blocks


def test_two_towers_are_pruned_each_to_its_own_count() -> None:
    case = OTHERS["clip"]
    model = case.build()
    plan = planned(model, 0.3, "magnitude", [case.inputs()])
    counts = {
        name: {len(p.channels or ()) for (n, _), p in plan.blocks.items() if n == name} for name in ("text", "vision")
    }
    assert all(len(found) == 1 for found in counts.values())
    assert counts["text"] != counts["vision"]


def test_what_cannot_be_done_is_an_error() -> None:
    model = tiny_llama()
    with pytest.raises(RecipeError, match="leave nothing"):
        planned(model, 0.97)
    with pytest.raises(CalibrationError, match="no calibration data"):
        planned(model, 0.2, batches=[])
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(CalibrationError, match="NaN or Inf"):
        planned(model, 0.2, "magnitude")


def test_ratio_zero_removes_nothing() -> None:
    assert planned(tiny_llama(), 0.0).blocks == {}


def test_an_unknown_family_cannot_be_pruned() -> None:
    with pytest.raises(ArchitectureError, match="no role table"):
        planned(tiny_unknown(), 0.2)


def test_progress_ends_at_its_total() -> None:
    calls: list[tuple[str, int, int]] = []
    model = tiny_llama()
    step = PruneStep("width", "wanda", ratio=0.2)
    plan_width(model, bind(model), step, WIDTH.build("wanda", {}), tokens(), progress=lambda *call: calls.append(call))
    for name in ("scoring units", "choosing units"):
        steps = [(done, total) for kind, done, total in calls if kind == name]
        assert [done for done, _ in steps] == list(range(steps[0][1] + 1)) and steps[-1][0] == steps[-1][1]
