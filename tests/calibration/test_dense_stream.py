"""The dense model followed along a walk that changes it."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_llama
from torch import nn

from hf_shrink.calibration import dense_stream, shelf
from hf_shrink.calibration.capture import first_output
from hf_shrink.calibration.dense_stream import ENOUGH, DenseStream
from hf_shrink.calibration.statistics import InputStatistics
from hf_shrink.calibration.walk import StackWalk

NAMES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
NAMES += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def batches(count: int = 4) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    found = []
    for index in range(count):
        mask = torch.ones(2, 10, dtype=torch.long)
        mask[0, :index] = 0
        found.append({"input_ids": torch.randint(3, 300, (2, 10), generator=draw), "attention_mask": mask})
    return found


def dense_outputs(
    data: list[dict[str, torch.Tensor]],
) -> tuple[list[list[torch.Tensor]], list[dict[str, torch.Tensor]]]:
    """[block][batch] outputs of the dense model, and the inputs of the second block's matrices on the first batch."""
    model = tiny_llama()
    walk = StackWalk(model, list(model.model.layers), data)
    outputs = []
    for _ in model.model.layers:
        outputs.append([first_output(walk.call(batch)) for batch in range(len(data))])
        walk.advance()
    return outputs


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("on_file", [False, True])
def test_dense_states_stay_those_of_the_dense_model(
    on_file: bool, in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if on_file:
        monkeypatch.setattr(shelf, "SMALLEST", 1)
        for user in (shelf, dense_stream):
            monkeypatch.setattr(user, "IN_MEMORY", 0)
    data = batches()
    expected = dense_outputs(data)
    model = tiny_llama()
    layers = list(model.model.layers)
    walk = StackWalk(model, layers, data)
    dense = DenseStream(model, layers, data, tokens=0, everything=True)
    inputs: dict[str, InputStatistics] = {}
    for index in range(len(layers)):
        paths = {f"model.layers.{index}.{name}": layers[index].get_submodule(name) for name in NAMES}

        def solve(found: dict[str, InputStatistics]) -> None:
            for path, statistics in found.items():
                inputs[path] = statistics
                old = model.get_submodule(path)
                if in_place:
                    old.weight.data *= 0.7
                    continue
                new = nn.Linear(old.in_features, old.out_features, bias=False)
                new.weight = nn.Parameter(old.weight.detach() * 0.7)
                model.set_submodule(path, new)

        passed = walk.advance_in_stages(paths, solve, model.get_submodule, dense=dense, in_place=in_place)
        assert passed is not None
        for batch in range(len(data)):
            torch.testing.assert_close(dense.target(batch), expected[index][batch])
    first = inputs["model.layers.0.self_attn.q_proj"].drift
    assert first is not None and float(first.measured.cross.abs().max()) == 0  # both streams begin with the embeddings
    later = inputs["model.layers.0.mlp.down_proj"].drift
    assert later is not None and float(later.measured.cross.abs().max()) > 0


@pytest.mark.parametrize("copies", [False, True])
def test_weights_that_stay_are_not_copied(copies: bool) -> None:
    data, model = batches(), tiny_llama()
    layers = list(model.model.layers)
    dense = DenseStream(model, layers, data, tokens=0, everything=True)
    matrices = {f"model.layers.0.{name}": layers[0].get_submodule(name) for name in NAMES}
    own = {p.data_ptr() for p in layers[0].parameters()}
    with dense.following(layers[0], matrices, [[path] for path in matrices], copies=copies):
        twin = dense.walk.block
        assert twin is not layers[0]
        assert {p.data_ptr() for p in twin.parameters()} & own == (set() if copies else own)


def test_drift_is_the_difference_of_the_inputs_of_real_tokens() -> None:
    data = batches()
    model, reference = tiny_llama(), tiny_llama()
    layers = list(model.model.layers)
    walk = StackWalk(model, layers, data)
    dense = DenseStream(model, layers, data, tokens=walk.tokens, everything=False)
    path = "model.layers.0.self_attn.o_proj"
    seen: dict[str, list[torch.Tensor]] = {"dense": [], "compressed": []}

    def solve(found: dict[str, InputStatistics]) -> None:
        for name, statistics in found.items():
            if name == path:
                solve.drift = statistics.drift
            if name.endswith("v_proj"):
                with torch.no_grad():
                    model.get_submodule(name).weight *= 0.5

    def record(kind: str):
        return lambda module, args: seen[kind].append(args[0].detach())

    matrices = {f"model.layers.0.{name}": layers[0].get_submodule(name) for name in NAMES}
    walk.advance_in_stages(matrices, solve, model.get_submodule, dense=dense)
    hooks = [
        m.get_submodule(path).register_forward_pre_hook(record(k))
        for m, k in ((model, "compressed"), (reference, "dense"))
    ]
    with torch.no_grad():
        for batch in data:
            model(**batch), reference(**batch)
    for hook in hooks:
        hook.remove()
    rows = {k: [x[b["attention_mask"].bool()] for x, b in zip(v, data, strict=True)] for k, v in seen.items()}
    measured, held = [0, 2], 3  # every second one of those not held out; the last eighth, at least one
    change = {b: (rows["dense"][b] - rows["compressed"][b]).double() for b in (*measured, held)}
    cross = sum(change[b].T @ rows["compressed"][b].double() for b in measured)
    torch.testing.assert_close(solve.drift.measured.cross.double(), cross, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        solve.drift.held.cross.double(), change[held].T @ rows["compressed"][held].double(), rtol=1e-4, atol=1e-4
    )
    assert solve.drift.measured.tokens == sum(len(rows["dense"][b]) for b in measured)


def test_one_batch_holds_nothing_out() -> None:
    model = tiny_llama()
    dense = DenseStream(model, list(model.model.layers), batches(1), tokens=9, everything=False)
    assert not dense.held_out
    assert dense.measured_place(0) == 0


def test_many_tokens_are_measured_on_fewer_batches() -> None:
    model = tiny_llama()
    layers = list(model.model.layers)
    widest = max(module.in_features for module in layers[0].modules() if isinstance(module, nn.Linear))
    few, many = (
        DenseStream(model, layers, batches(16), tokens=times * ENOUGH * widest, everything=False) for times in (1, 5)
    )
    assert [batch for batch in range(16) if few.measured_place(batch) is not None] == [0, 2, 4, 6, 8, 10, 12, 14, 15]
    assert [batch for batch in range(16) if many.measured_place(batch) is not None] == [0, 5, 10, 14, 15]
