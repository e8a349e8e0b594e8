"""Capture, walk and statistics: what blocks are called with, what is shared, and that the model is left as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conformance.cases import CASES, tokens
from conformance.cases_encoders import CASES as ENCODERS
from tiny import tiny_llama
from torch import Tensor, nn

from hf_shrink.architectures import bind
from hf_shrink.calibration.ahead import ahead
from hf_shrink.calibration.capture import capture
from hf_shrink.calibration.statistics import InputStatistics
from hf_shrink.calibration.walk import StackWalk
from hf_shrink.errors import ArchitectureError, CalibrationError

BATCH = {"input_ids": tokens(2, 9)}


def walk_of(model: Any, batches: list[dict[str, Tensor]], stack: int = 0, **settings: Any) -> StackWalk:
    return StackWalk(model, [block.module for block in bind(model).stacks[stack].blocks], batches, **settings)


def matrices_of(model: Any, block: int, stack: int = 0) -> dict[str, nn.Module]:
    return {path: model.get_submodule(path) for path in bind(model).stacks[stack].blocks[block].roles}


def untouched(model: nn.Module) -> bool:
    return not any("forward" in m.__dict__ or m._forward_pre_hooks for m in model.modules())


def test_second_moments_are_those_of_float64() -> None:
    # Wider than one panel of the symmetric product, and not a multiple of it.
    x = torch.randn(3, 50, 400)
    statistics = InputStatistics.empty(400)
    statistics.add(x[:2])
    statistics.add(x[2].to(torch.bfloat16))
    exact = torch.cat([x[:2].reshape(-1, 400), x[2].to(torch.bfloat16).float()]).double()
    expected = exact.T @ exact
    found = statistics.finish("x")
    assert found.hessian.dtype == torch.float32 and found.tokens == 150
    assert torch.equal(found.hessian, found.hessian.T)
    assert (found.hessian - expected).norm() <= 1e-5 * expected.norm()
    assert torch.allclose(found.mean, found.hessian / 150)


def test_statistics_without_tokens_or_with_infinities_are_refused() -> None:
    with pytest.raises(CalibrationError, match=r"a\.b saw no calibration tokens"):
        InputStatistics.empty(4).finish("a.b")
    statistics = InputStatistics.empty(4)
    statistics.add(torch.tensor([[1.0, float("inf"), 0.0, 0.0]]))
    with pytest.raises(CalibrationError, match=r"NaN or Inf in the inputs of a\.b"):
        statistics.finish("a.b")


def test_matrices_with_the_same_input_share_one_statistic() -> None:
    model = tiny_llama()
    found = walk_of(model, [BATCH]).statistics(matrices_of(model, 0))
    by_role = {path.rpartition(".")[2]: statistics for path, statistics in found.items()}
    assert by_role["q_proj"] is by_role["k_proj"] is by_role["v_proj"]
    assert by_role["gate_proj"] is by_role["up_proj"]
    assert len({id(statistics) for statistics in found.values()}) == 4
    assert by_role["down_proj"].hessian.shape == (80, 80)


def test_once_the_order_is_known_a_batch_stops_at_the_last_matrix() -> None:
    model = tiny_llama()
    walk = walk_of(model, [BATCH, BATCH, BATCH])
    runs: list[str] = []
    block = model.model.layers[0]
    for name in ("o_proj", "q_proj"):
        getattr(block.self_attn, name).register_forward_hook(lambda *_, name=name: runs.append(name))
    paths = ("self_attn.q_proj", "self_attn.k_proj")
    walk.statistics({f"model.layers.0.{path}": block.get_submodule(path) for path in paths})
    # The first batch runs whole to learn the order; the others stop before what comes after k_proj.
    assert runs == ["q_proj", "o_proj", "q_proj", "q_proj"]


def test_the_capture_stops_at_the_last_block() -> None:
    model = tiny_llama()
    heads: list[int] = []
    model.lm_head.register_forward_hook(lambda *_: heads.append(1))
    found = capture(model, list(model.model.layers), [BATCH, BATCH])
    assert not heads and len(found.hidden) == 2 and [len(calls) for calls in found.calls] == [4, 4]
    assert torch.equal(found.hidden[0], model.model.embed_tokens(BATCH["input_ids"]))


def test_padding_does_not_count() -> None:
    model = tiny_llama()
    mask = torch.tensor([[1] * 6 + [0] * 3, [1] * 9])
    found = walk_of(model, [{**BATCH, "attention_mask": mask}]).statistics(matrices_of(model, 0))
    assert {statistics.tokens for statistics in found.values()} == {15}


def test_padding_does_not_count_where_a_block_merges_batch_and_sequence() -> None:
    model = CASES["opt"].build()
    padded = CASES["opt"].padded()
    found = walk_of(model, [padded]).statistics(matrices_of(model, 0))
    assert {statistics.tokens for statistics in found.values()} == {26}


def test_a_position_bias_goes_from_the_first_block_to_the_others() -> None:
    model, inputs = ENCODERS["t5"].build(), ENCODERS["t5"].inputs()
    blocks = [block.module for block in bind(model).stack("encoder").blocks]
    found = capture(model, blocks, [inputs])
    assert found.links[0] == {}
    assert [set(links.values()) for links in found.links[1:]] == [{(0, 1)}, {(1, 1)}]  # each hands it on

    # A changed first block: its new bias must reach the later ones.
    walk = StackWalk(model, blocks, [inputs])
    with torch.no_grad():
        blocks[0].layer[0].SelfAttention.relative_attention_bias.weight.mul_(-3)
    for _ in blocks:
        walk.advance()
    seen: list[Tensor] = []
    blocks[-1].register_forward_hook(lambda _, __, output: seen.append(output[0]))
    with torch.no_grad():
        model(**inputs)
    assert torch.allclose(walk.hidden[0], seen[0], atol=1e-5)


def test_a_look_ahead_sees_what_is_handed_on_and_leaves_the_walk_where_it_is() -> None:
    model, inputs = ENCODERS["t5"].build(), ENCODERS["t5"].inputs()
    blocks = [block.module for block in bind(model).stack("encoder").blocks]
    walk, other = (StackWalk(model, blocks, [inputs, inputs]) for _ in range(2))
    with torch.no_grad():
        blocks[0].layer[0].SelfAttention.relative_attention_bias.weight.mul_(-3)
    before = walk.hidden[1].clone()
    expected = []
    for _ in blocks:
        other.advance()
        expected.append(other.hidden[1])
    for count in (len(blocks), 1, 2):
        assert torch.equal(ahead(walk, 1, count), expected[count - 1])
        assert walk.position == 0 and torch.equal(walk.hidden[1], before) and not any(walk.arguments.handed)
    walk.advance()
    assert torch.equal(ahead(walk, 1, 1), expected[1])


def test_a_changed_block_changes_what_the_next_one_sees() -> None:
    model = tiny_llama()
    walk = walk_of(model, [BATCH])
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.zero_()
    walk.advance()
    seen: list[Tensor] = []
    model.model.layers[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(**BATCH)
    assert torch.equal(walk.hidden[0], seen[0]) and walk.position == 1


def test_nan_stops_the_walk_and_names_the_place() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    walk = walk_of(model, [BATCH])
    walk.advance()
    with pytest.raises(CalibrationError, match="block 1"):
        walk.advance()

    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight[0, 0] = float("inf")
    with pytest.raises(CalibrationError, match=r"inputs of model\.layers\.0\.self_attn\.o_proj"):
        walk_of(model, [BATCH]).statistics(matrices_of(model, 0))
    assert untouched(model)


def test_a_matrix_that_never_runs_is_named() -> None:
    model = tiny_llama()
    matrices = {**matrices_of(model, 0), "elsewhere": nn.Linear(48, 48)}
    with pytest.raises(CalibrationError, match="elsewhere saw no calibration tokens"):
        walk_of(model, [BATCH]).statistics(matrices)


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], CalibrationError, "no calibration data"),
        ([{"input_ids": torch.full((1, 3), 9999)}], IndexError, "out of range"),
        ([BATCH, {"input_ids": torch.full((1, 3), 9999)}], IndexError, "out of range"),
    ],
)
def test_the_model_is_as_before_after_an_error(batches: Any, error: type[Exception], message: str) -> None:
    model = tiny_llama()
    before = model(**BATCH).logits
    with pytest.raises(error, match=message):
        capture(model, list(model.model.layers), batches)
    assert untouched(model) and torch.equal(model(**BATCH).logits, before)


def test_a_replaced_forward_is_put_back() -> None:
    """As accelerate's hooks leave one on the instance."""
    model = tiny_llama()
    block = model.model.layers[1]
    own = block.forward
    wrapped = lambda *args, **kwargs: own(*args, **kwargs)  # noqa: E731
    block.forward = wrapped
    capture(model, list(model.model.layers), [BATCH])
    assert block.forward is wrapped and "forward" not in model.model.layers[0].__dict__


def test_hidden_states_changed_between_blocks_are_noticed() -> None:
    class Scaling(nn.Module):
        """A model that does something of its own between two blocks."""

        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[1](self.blocks[0](x) * 2)

    scaling = Scaling()
    with pytest.raises(ArchitectureError, match="between block 0 and block 1"):
        capture(scaling, list(scaling.blocks), [{"x": torch.randn(1, 3, 8)}])
    assert untouched(scaling)


def test_blocks_that_are_never_reached_are_an_error() -> None:
    model = tiny_llama()
    with pytest.raises(CalibrationError, match="ran 4 of its 5 blocks"):
        capture(model, [*model.model.layers, nn.Linear(48, 48)], [BATCH])
    assert untouched(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_half_precision_model_walks_in_float32_or_its_own(dtype: torch.dtype) -> None:
    model = tiny_llama().to(torch.bfloat16)
    reference = copy.deepcopy(model).to(dtype)
    walk = walk_of(model, [BATCH], compute_dtype=dtype)
    for block in model.model.layers:
        block.to(dtype)
        walk.advance()
        block.to(torch.bfloat16)
    seen: list[Tensor] = []
    reference.model.layers[-1].register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        reference(**BATCH)
    assert walk.hidden[0].dtype == dtype
    # Masks and positions are made in bfloat16 by the model itself, then cast: exact in bfloat16, near in float32.
    limit = 0 if dtype == torch.bfloat16 else 2e-2
    assert (walk.hidden[0] - seen[0]).abs().max() <= limit * seen[0].abs().max()


def test_one_pass_for_a_block_that_stays_is_the_two() -> None:
    model, batches = tiny_llama(), [BATCH, {"input_ids": tokens(3, 7)}]
    two, one = walk_of(model, batches), walk_of(model, batches)
    for block in range(2):
        matrices = matrices_of(model, block)
        wanted = two.statistics(matrices)
        two.advance()
        found = one.statistics(matrices, passing=True)
        assert wanted.keys() == found.keys() == matrices.keys()
        assert all(torch.equal(found[path].hessian, wanted[path].hessian) for path in matrices)
        assert one.position == two.position == block + 1
        assert all(torch.equal(one.hidden[b], two.hidden[b]) for b in range(2))
