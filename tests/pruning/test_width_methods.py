"""What scorers see of a block, and their scores, against slow float64 references."""

from __future__ import annotations

import pytest
import torch
from conformance.cases import CASES
from tiny import tiny_llama
from torch import Tensor, nn

from hf_shrink.architectures import bind
from hf_shrink.architectures.linears import matrix
from hf_shrink.errors import CalibrationError, RecipeError
from hf_shrink.pruning.base import DEPTH, WIDTH, UnitView
from hf_shrink.pruning.units import channel_view, group_view, head_view


def second_moment(size: int) -> Tensor:
    x = torch.randn(50, size) * torch.linspace(0.1, 3, size)
    return x.T @ x / 50


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def weights(block: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().double() for name, p in block.named_parameters()}


def test_the_registries_find_the_methods() -> None:
    assert {"magnitude", "wanda"} <= set(WIDTH.names())
    assert {"block_influence", "kl_greedy"} <= set(DEPTH.names())
    with pytest.raises(RecipeError, match="did you mean 'wanda'"):
        WIDTH.get("wando")
    with pytest.raises(RecipeError, match="tokens"):
        DEPTH.build("kl_greedy", {"token": 5})
    with pytest.raises(RecipeError, match="at least 1"):
        DEPTH.build("kl_greedy", {"tokens": 0})


def test_wanda_scores_are_the_columns_weighted_by_the_rms_of_their_inputs() -> None:
    block = bind(tiny_llama()).blocks[1]
    assert block.attention and block.mlp
    w, wanda = weights(block.module), WIDTH.build("wanda", {})
    moment = second_moment(96)
    rms = moment.diagonal().double().sqrt()
    output, down = w["self_attn.o_proj.weight"], w["mlp.down_proj.weight"]
    heads = torch.stack([((output * rms)[:, h * 16 : h * 16 + 16]).norm() ** 2 for h in range(6)])
    groups = torch.stack([((output * rms)[:, g * 32 : g * 32 + 32]).norm() ** 2 for g in range(3)])
    close(wanda.score(head_view(block.attention, moment)), heads)
    close(wanda.score(group_view(block.attention, moment)), groups)
    moment = second_moment(80)
    rms = moment.diagonal().double().sqrt()
    channels = torch.stack([(down[:, c] * rms[c]).norm() ** 2 for c in range(80)])
    close(wanda.score(channel_view(block.mlp, moment)), channels)


def test_wanda_without_statistics_says_what_it_needs() -> None:
    block = bind(tiny_llama()).blocks[0]
    assert block.mlp
    with pytest.raises(CalibrationError, match="calibration data"):
        WIDTH.build("wanda", {}).score(channel_view(block.mlp, None))


def test_magnitude_scores_are_the_squared_norms_of_all_weights_of_a_unit() -> None:
    block = bind(tiny_llama()).blocks[2]
    assert block.attention and block.mlp
    w, magnitude = weights(block.module), WIDTH.build("magnitude", {})
    q, k, v, o = (w[f"self_attn.{n}_proj.weight"] for n in "qkvo")
    rows, pair = (lambda h: slice(h * 16, h * 16 + 16)), (lambda g: slice(g * 32, g * 32 + 32))
    heads = [q[rows(h)].norm() ** 2 + o[:, rows(h)].norm() ** 2 for h in range(6)]
    groups = [
        q[pair(g)].norm() ** 2 + k[rows(g)].norm() ** 2 + v[rows(g)].norm() ** 2 + o[:, pair(g)].norm() ** 2
        for g in range(3)
    ]
    close(magnitude.score(head_view(block.attention, None)), torch.stack(heads))
    close(magnitude.score(group_view(block.attention, None)), torch.stack(groups))
    gate, up, down = (w[f"mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
    channels = [gate[c].norm() ** 2 + up[c].norm() ** 2 + down[:, c].norm() ** 2 for c in range(80)]
    close(magnitude.score(channel_view(block.mlp, None)), torch.stack(channels))


@pytest.mark.parametrize("name", sorted(CASES))
def test_views_hold_every_weight_of_the_roles_exactly_once(name: str) -> None:
    """However a family fuses and orders its matrices: the squared norms of the views add up to those of the weights."""
    block = bind(CASES[name].build()).blocks[-1]
    views: list[tuple[UnitView, set[str]]] = []
    if block.attention:
        roles = {s.path for s in block.attention.slots}
        views.append((group_view(block.attention, None), roles))
    if block.mlp:
        views.append((channel_view(block.mlp, None), {s.path for s in block.mlp.slots}))
    assert views
    for view, paths in views:
        modules = dict(block.module.named_modules())
        expected = sum(matrix(modules[p.removeprefix(block.path + ".")]).double().norm() ** 2 for p in paths)
        found = WIDTH.build("magnitude", {}).score(view).double().sum()
        close(found, expected)
