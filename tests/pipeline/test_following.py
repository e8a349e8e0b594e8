"""GPTQ's options that concern the walk, and learned rounding, on whole tiny models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import QUICK_GPTQ, tiny_llama

from hf_shrink import shrink


def batches(count: int = 8, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    found = []
    for index in range(count):
        mask = torch.ones(4, 24, dtype=torch.long)
        mask[0, : index % 4] = 0
        found.append({"input_ids": torch.randint(3, 300, (4, 24), generator=draw), "attention_mask": mask})
    return found


def shrunk(model: Any = None, data: Any = None, prune: dict[str, Any] | None = None, **quantize: Any) -> Any:
    step = {"method": "gptq", "scheme": "W3A16", "group_size": 16, **quantize}
    steps = [{"prune": prune}] if prune else []
    recipe = {"portable": False, "steps": [*steps, {"quantize": step}]}
    return shrink(model or two_blocks(), recipe, calibration=data or batches(), progress=False)


def two_blocks() -> Any:
    return tiny_llama(num_hidden_layers=2)


@pytest.fixture(scope="module")
def four_blocks() -> dict[str, Any]:
    """Four blocks by GPTQ as it is, without the asymmetric target, and without true sequence either; read only."""
    options = {"both": {}, "sequential": {"asymmetric": False}, "neither": {"true_sequential": False}}
    return {name: shrunk(tiny_llama(), **changes) for name, changes in options.items()}


def divergence(model: Any) -> float:
    """KL(dense || model) in nats a token on data that was not calibrated on."""
    dense, total, count = tiny_llama(num_hidden_layers=model.config.num_hidden_layers), 0.0, 0
    with torch.no_grad():
        for batch in batches(6, seed=7):
            real = batch["attention_mask"].bool()
            p, q = (m(**batch).logits.double().log_softmax(-1)[real] for m in (dense, model))
            total, count = total + float((p.exp() * (p - q)).sum()), count + len(p)
    return total / count


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_aiming_at_the_dense_model_helps_on_fresh_data(four_blocks: dict[str, Any]) -> None:
    assert divergence(four_blocks["both"]) < 0.97 * divergence(four_blocks["sequential"])


def test_true_sequential_helps_and_is_an_option(four_blocks: dict[str, Any]) -> None:
    sequential, at_once = four_blocks["sequential"], four_blocks["neither"]
    assert not same(sequential, at_once)
    assert divergence(sequential) < divergence(at_once)
    first = "model.layers.0.self_attn.q_proj.weight_packed"  # nothing was rounded before it
    assert torch.equal(sequential.state_dict()[first], at_once.state_dict()[first])


@pytest.mark.parametrize("change", [{}, {"method": "learned", "steps": 6}])
def test_the_same_bytes_twice(change: dict[str, Any]) -> None:
    assert same(shrunk(**change), shrunk(**change))


def test_learned_rounding_is_no_worse_and_says_what_it_did() -> None:
    model = shrunk(method="learned", steps=24, rounding_rate=0.02)
    (note,) = [note for note in model.shrink_report.notes if "learned rounding took" in note]
    before, after = (float(note.split("from ")[1].split(" to ")[k].split(" in ")[0]) for k in (0, 1))
    assert after < before
    assert model.shrink_report.seconds["learn"] > 0
    assert divergence(model) < 1.1 * divergence(shrunk())


def test_learned_rounding_leaves_no_gradients_behind() -> None:
    """Those of norms, biases and dense matrices were summed over all steps; a later optimizer.step() applied them."""
    model = shrunk(
        tiny_llama(num_hidden_layers=2, attention_bias=True),
        method="learned",
        start="rtn",
        steps=3,
        ignore=["re:.*up_proj"],
    )
    dense = tiny_llama(num_hidden_layers=2, attention_bias=True)
    kept = dict(model.named_parameters())
    assert {"model.layers.0.input_layernorm.weight", "model.layers.0.mlp.up_proj.weight"} <= set(kept)
    assert "model.layers.1.self_attn.q_proj.bias" in kept
    for name, parameter in kept.items():
        assert parameter.grad is None and parameter.requires_grad, name
        if "norm" in name or "bias" in name or "up_proj" in name:
            assert torch.equal(parameter, dense.get_parameter(name)), name


@pytest.mark.parametrize("method", ["gptq", "learned"])
def test_pruned_blocks_transforms_and_tuning_in_one_run(method: str) -> None:
    options = {"steps": 4} if method == "learned" else QUICK_GPTQ
    prune = {"what": "width", "method": "magnitude", "ratio": 0.2, "units": "mlp"}
    wanted = {"method": method, "transforms": ["awq"], "tune": {"steps": 3}, **options}
    model = shrunk(prune=prune, **wanted)
    assert sum(layer.mlp.down_proj.in_features for layer in model.model.layers) < 2 * 80
    assert any("tuning" in note for note in model.shrink_report.notes)
    with torch.no_grad():
        assert torch.isfinite(model(**batches(1)[0]).logits).all()


def test_one_batch_goes_without_held_out_data() -> None:
    assert torch.isfinite(torch.tensor(divergence(shrunk(data=batches(1)))))


def test_half_precision_blocks_are_followed_in_float32() -> None:
    model = shrunk(two_blocks().to(torch.bfloat16))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(error < 1 for error in model.shrink_report.block_errors.values())
