"""Width pruning by second order on tiny models: what is planned, how it is measured, what a refit leaves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conformance.cases_encoders import CASES as OTHERS
from tiny import VOCABULARY, tiny_llama
from torch import Tensor, nn

from hf_shrink.architectures import bind
from hf_shrink.calibration.predictions import divergence, keep, predictions_of
from hf_shrink.calibration.statistics import InputStatistics
from hf_shrink.errors import CalibrationError, RecipeError
from hf_shrink.pruning.base import WIDTH
from hf_shrink.pruning.plan_width import WidthPlan, plan_width
from hf_shrink.pruning.refit import refit_reader
from hf_shrink.pruning.trials import Trials
from hf_shrink.pruning.units import channel_view, group_view, head_view
from hf_shrink.recipe import PruneStep


def tokens(batches: int = 3, rows: int = 6, length: int = 40, seed: int = 0) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, VOCABULARY, (rows, length), generator=draw)} for _ in range(batches)]


def planned(model: nn.Module, ratio: float = 0.2, batches: Any = None, portable: bool = True, **kw: Any) -> WidthPlan:
    options = {key: kw.pop(key) for key in ("exchanges", "damping") if key in kw}
    step = PruneStep("width", "obs", ratio=ratio, **kw)
    method = WIDTH.build("obs", options)
    return plan_width(model, bind(model), step, method, tokens() if batches is None else batches, portable=portable)


def moment(size: int) -> Tensor:
    x = torch.randn(200, size) @ (torch.randn(size, size) / size**0.5 + torch.eye(size))
    return x.T @ x / 200


def test_the_options_are_checked() -> None:
    with pytest.raises(RecipeError, match="damping"):
        WIDTH.build("obs", {"damping": 0})
    with pytest.raises(RecipeError, match="exchanges"):
        WIDTH.build("obs", {"exchanges": -1})
    block = bind(tiny_llama()).blocks[0]
    assert block.mlp
    with pytest.raises(CalibrationError, match="calibration data"):
        WIDTH.build("obs", {}).curve(channel_view(block.mlp, None))


def test_heads_go_in_rounds_and_both_ways_are_in_one_measure() -> None:
    block = bind(tiny_llama()).blocks[1]
    assert block.attention
    method, second = WIDTH.build("obs", {}), moment(96)
    heads = method.curve(head_view(block.attention, second))
    groups = method.curve(group_view(block.attention, second))
    for start in (0, 3):
        assert sorted(h // 2 for h in heads.order[start : start + 3].tolist()) == [0, 1, 2]
    assert heads.total == pytest.approx(groups.total, rel=1e-6)
    removed = method.improved(head_view(block.attention, second), heads.order[:3])
    assert sorted(h // 2 for h in removed.tolist()) == [0, 1, 2]


def test_what_others_can_make_up_for_goes_first() -> None:
    """Two channels of the same input: wanda and magnitude see nothing special in them, obs knows one is enough."""
    model = tiny_llama()
    for layer in model.model.layers:
        for weight in (layer.mlp.gate_proj.weight.data, layer.mlp.up_proj.weight.data):
            weight[9] = weight[3]
        layer.mlp.down_proj.weight.data[:, [3, 9]] *= 4  # nothing else matters as much
    one = bind(model).blocks[0].mlp.channel_parameters * 4
    plan = planned(model, one / bind(model).stacks[0].parameters, units="mlp", damping=1e-4)
    gone = [set(range(80)) - set(block.channels or ()) for block in plan.blocks.values()]
    assert all(len(removed) == 1 and removed < {3, 9} for removed in gone) and len(gone) == 4


@pytest.mark.parametrize("portable", [True, False])
@pytest.mark.parametrize("units", ["all", "mlp"])
def test_the_same_plan_twice_with_the_asked_ratio(units: str, portable: bool) -> None:
    model = tiny_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first, second = (planned(model, 0.25, units=units, portable=portable) for _ in range(2))
    assert first == second
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    binding, gone = bind(model), 0
    for (_, index), plan in first.blocks.items():
        block = binding.blocks[index]
        gone += block.mlp.channel_parameters * (80 - len(plan.channels or range(80)))
        if plan.query_heads is not None:
            groups = len(block.attention.groups_of(plan.query_heads))
            gone += (6 - len(plan.query_heads)) * block.attention.head_parameters
            gone += (3 - groups) * (block.attention.group_parameters - 2 * block.attention.head_parameters)
    assert gone / binding.stacks[0].parameters == pytest.approx(0.25, abs=0.01)
    if portable:
        assert len({len(plan.channels or ()) for plan in first.blocks.values()}) == 1


def test_uneven_spares_the_block_that_the_predictions_need() -> None:
    """The same relative errors in every block, but one block's outputs hardly reach the predictions."""
    model = tiny_llama()
    quiet = model.model.layers[1]
    for weight in (quiet.mlp.down_proj.weight, quiet.self_attn.o_proj.weight):
        weight.data *= 0.02
    plan = planned(model, 0.3, portable=False)
    kept = {
        block: (len(p.channels or range(80)), len(p.query_heads or range(6))) for (_, block), p in plan.blocks.items()
    }
    assert kept[1] == (16, 2)
    assert all(channels > 30 for block, (channels, _) in kept.items() if block != 1)


def test_portable_takes_from_where_the_predictions_need_it_least() -> None:
    """All attention hardly matters: it gives what whole heads can, before any channel does."""
    model = tiny_llama()
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data *= 1e-3
    plan = planned(model, 0.4)
    assert {len(p.query_heads or range(6)) for p in plan.blocks.values()} == {2}
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data *= 1e3
        layer.mlp.down_proj.weight.data *= 1e-3
    assert all(p.query_heads is None for p in planned(model, 0.25).blocks.values())


def test_a_trial_is_the_divergence_of_the_changed_model_and_leaves_the_model_alone() -> None:
    model, data = tiny_llama(), tokens(1, 2, 30)
    trials = Trials(model, bind(model), data, seed=0)
    module = model.model.layers[2].mlp.down_proj
    own, changed = module.weight.detach().clone(), module.weight.detach() * 0.5
    found = trials.divergence(("decoder", 2), module, changed, None)
    assert torch.equal(module.weight, own)
    with torch.no_grad():
        dense = keep(predictions_of(model(**data[0]), data[0]))
        module.weight.copy_(changed)
        expected = divergence(dense, predictions_of(model(**data[0]), data[0])) / 60
    assert found == pytest.approx(expected, rel=1e-3) and found > 1e-5


def test_a_trial_that_fails_half_way_leaves_the_model_alone() -> None:
    model = tiny_llama()
    trials = Trials(model, bind(model), tokens(1, 2, 30), seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = (layer.mlp.down_proj.weight.data for layer in model.model.layers[:2])
    with pytest.raises(RuntimeError):  # as where memory runs out
        trials.divergence_of([(first, torch.zeros_like(first)), (second, torch.zeros(3, 5))])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_encoder_with_biases_is_measured_with_them() -> None:
    case = OTHERS["bert_classifier"]
    model, inputs = case.build(), [case.inputs() for _ in range(3)]
    plan = planned(model, 0.3, inputs, portable=False)
    assert plan == planned(model, 0.3, inputs, portable=False)
    assert any(p.query_heads for p in plan.blocks.values()) or any(p.channels for p in plan.blocks.values())


def statistics(x: Tensor, dense: Tensor | None = None, held: int = 0) -> InputStatistics:
    found = InputStatistics.empty(x.shape[1])
    if dense is None:
        found.add(x)
    else:
        found.add_drift(x[:-held], dense[:-held], held_out=False)
        found.add_drift(x[-held:], dense[-held:], held_out=True)
    return found.finish("x")


def inputs(tokens: int = 900, size: int = 24, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=draw) / size**0.5 + torch.eye(size)
    return torch.randn(tokens, size, generator=draw) @ mix + 3 * torch.randn(size, generator=draw)


KEPT = torch.tensor([0, 1, 4, 5, 6, 9, 12, 13, 17, 20, 22])


def test_with_a_bias_it_is_the_affine_least_squares_solution() -> None:
    x, weight, bias = inputs(), torch.randn(7, 24), torch.randn(7)
    found = refit_reader(weight, bias, statistics(x), KEPT, damping=0.0)
    target = x.double() @ weight.double().T + bias.double()
    given = torch.cat([x[:, KEPT].double(), torch.ones(len(x), 1).double()], 1)
    expected = torch.linalg.lstsq(given, target).solution.T
    torch.testing.assert_close(found.weight.double(), expected[:, :-1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.bias.double(), expected[:, -1], rtol=1e-3, atol=1e-2)


def test_constant_inputs_that_go_are_put_into_the_bias() -> None:
    x, weight, bias = inputs(), torch.randn(7, 24), torch.randn(7)
    gone = [n for n in range(24) if n not in KEPT.tolist()]
    x[:, gone] = torch.linspace(-2, 5, len(gone))
    found = refit_reader(weight, bias, statistics(x), KEPT, damping=1e-6)
    target = x @ weight.T + bias
    error = x[:, KEPT] @ found.weight.T + found.bias - target
    assert float(error.square().mean()) < 1e-4 * float(target.square().mean())
    moment = statistics(x).covariance
    assert float(moment[gone].abs().max()) < 1e-4 and bool((moment.diagonal()[KEPT] > 0.1).all())


@pytest.mark.parametrize("biased", [False, True])
def test_the_refit_aims_at_the_dense_outputs_on_the_dense_inputs(biased: bool) -> None:
    """Errors of earlier blocks: x is a mixed, shifted and noisy version of what the dense model would have there."""
    x = inputs(1800)
    draw = torch.Generator().manual_seed(1)
    mix = torch.eye(24) + 0.15 * torch.randn(24, 24, generator=draw)
    dense = x @ mix.T + 0.1 * torch.randn(x.shape, generator=draw) + (0.5 if biased else 0)
    weight, bias = torch.randn(7, 24), torch.randn(7) if biased else None
    found = {
        name: refit_reader(weight, bias, statistics(x[:900], dense[:900] if name == "dense" else None, 150), KEPT)
        for name in ("running", "dense")
    }
    target = dense[900:] @ weight.T + (0 if bias is None else bias)
    errors = {}
    for name, fit in found.items():
        output = x[900:, KEPT] @ fit.weight.T + (0 if fit.bias is None else fit.bias)
        errors[name] = float((output - target).square().mean())
    assert found["dense"].followed > 0.5 and found["running"].followed == 0
    assert errors["dense"] < 0.8 * errors["running"]


def test_a_drift_that_held_out_tokens_deny_is_not_followed() -> None:
    x = inputs()
    dense = x @ (torch.eye(24) + 0.15 * torch.randn(24, 24)).T
    against = torch.cat([dense[:-150], x[-150:] - (dense - x)[-150:]])
    weight = torch.randn(7, 24)
    everything = torch.arange(24)
    found = refit_reader(weight, None, statistics(x, against, 150), everything)
    assert found.followed == 0
    torch.testing.assert_close(found.weight, weight, rtol=1e-4, atol=1e-4)
