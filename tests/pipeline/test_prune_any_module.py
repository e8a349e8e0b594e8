"""Weights of plain modules: every kind of layer, full and partial, by |p| and by functions of one's own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_llama
from torch import Tensor, nn

from hf_shrink import load_module, prune_weights, save_module, shrink
from hf_shrink.architectures.weights import weight_refs
from hf_shrink.errors import CalibrationError, RecipeError


class Everything(nn.Module):
    """One of each kind; weights of unequal sizes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(30, 12)
        self.flat = nn.Conv1d(12, 8, 3)
        self.image = nn.Conv2d(4, 8, (3, 2), groups=2)
        self.volume = nn.Conv3d(4, 4, 2)
        self.lstm = nn.LSTM(8, 12, num_layers=2, bidirectional=True, proj_size=4)
        self.gru = nn.GRU(8, 12)
        self.cell = nn.LSTMCell(8, 4)
        self.attention = nn.MultiheadAttention(8, 2, kdim=12, vdim=4)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 16)


KINDS = {"embedding", "flat", "image", "volume", "lstm", "gru", "cell", "attention", "head"}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {ref.path: ref.parameter for ref in weight_refs(model)}


def test_every_kind_of_weight_is_found_once() -> None:
    model = Everything()
    expected = {name for name, p in model.named_parameters() if p.dim() > 1}
    assert set(weights(model)) == expected and {name.split(".")[0] for name in expected} == KINDS
    tied = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False))
    tied[1].weight = tied[0].weight
    assert list(weights(tied)) == ["0.weight"]


def test_rows_are_what_an_output_reads_and_go_back_where_they_were() -> None:
    model = Everything()
    x = torch.randn(2, 4, 5, 5)
    for ref in weight_refs(model):
        rows = ref.as_rows(ref.parameter.detach())
        before = ref.parameter.detach().clone()
        ref.write(rows.clone())
        assert torch.equal(ref.parameter, before), ref.path
        assert rows.shape[1] % ref.width == 0
    image = next(ref for ref in weight_refs(model) if ref.path == "image.weight")
    rows = image.as_rows(image.parameter.detach())
    rows[5] = 0.0  # a filter
    image.write(rows)
    assert torch.allclose(model.image(x)[:, 5], model.image.bias[5].expand(2, 3, 4))


def test_the_seed_formula_on_all_weights() -> None:
    model, dense = Everything(), Everything()
    fractions = prune_weights(model, threshold=0.1)
    for name, parameter in model.named_parameters():
        before = dense.get_parameter(name)
        if parameter.dim() > 1:
            assert torch.equal(parameter, torch.where(before.abs() <= 0.1, 0.0, before))
            assert fractions[name] == pytest.approx(float((before.abs() <= 0.1).float().mean()))
        else:
            assert torch.equal(parameter, before)


@pytest.mark.parametrize(
    ("targets", "ignore", "expected"),
    [
        (["LSTM"], None, {"lstm"}),
        (["re:.*weight_hh"], None, {"lstm", "gru", "cell"}),
        (["gru.weight_ih_l0", "head"], None, {"gru", "head"}),
        (None, ["re:(lstm|gru|cell)", "Conv2d"], KINDS - {"lstm", "gru", "cell", "image"}),
    ],
)
def test_partial_pruning(targets: list[str] | None, ignore: list[str] | None, expected: set[str]) -> None:
    model, dense = Everything(), Everything()
    fractions = prune_weights(model, sparsity=0.5, targets=targets, ignore=ignore)
    assert {path.split(".")[0] for path in fractions} == expected
    for name, parameter in weights(model).items():
        zeros = int((parameter == 0).sum()) - int((dense.get_parameter(name) == 0).sum())
        assert zeros == (parameter.numel() // 2 if name in fractions else 0), name
    if targets == ["gru.weight_ih_l0", "head"]:
        assert "gru.weight_hh_l0" not in fractions


def test_functions_of_gradients_and_one_rank_over_all() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 30), nn.Tanh(), nn.Linear(30, 2))
    model(torch.randn(50, 10)).square().mean().backward()
    scores = {n: (p * p.grad).abs().detach() for n, p in model.named_parameters() if p.dim() > 1}
    count = round(0.7 * 360)
    limit = torch.cat([s.flatten() for s in scores.values()]).sort().values[count - 1]
    prune_weights(model, lambda p: (p * p.grad).abs(), sparsity=0.7, granularity="global")
    for name, score in scores.items():
        assert torch.equal(model.get_parameter(name) == 0, score <= limit)


def test_patterns_run_along_the_channels_of_filters() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.LSTM(8, 4))
    fractions = prune_weights(model, pattern="2:4")
    assert set(fractions) == {"1.weight", "2.weight_ih_l0", "2.weight_hh_l0"}  # 3 channels are no multiple of 4
    kept = (model[1].weight != 0).movedim(1, -1).reshape(-1, 4).sum(-1)
    assert (kept == 2).all()
    with pytest.raises(RecipeError, match="rows of 3 weights"):
        prune_weights(model, pattern="2:4", targets=["0"])


def test_by_recipe_saved_and_loaded(tmp_path: Path) -> None:
    step = {"what": "weights", "method": "magnitude", "sparsity": 0.25, "granularity": "row", "ignore": ["head"]}
    model = shrink(Everything(), {"steps": [{"prune": step}]}, progress=False)
    rows = model.lstm.weight_ih_l0
    assert ((rows == 0).sum(1) == 2).all() and (model.head.weight != 0).all()
    assert any(note.startswith("LSTM: 25") for note in model.shrink_report.notes)
    save_module(model, tmp_path)
    again = load_module(Everything, tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    steps = [{"prune": step}, {"quantize": {"method": "rtn", "scheme": "W8A16", "targets": ["head", "embedding"]}}]
    both = shrink(Everything(), {"steps": steps}, progress=False)
    assert (both.embedding.weight == 0).float().mean() >= 0.25
    x = torch.randn(5, 2, 8)
    assert torch.isfinite(both.head(both.lstm(x)[0])).all()


def test_a_layer_alone_half_precision_and_transformers_models() -> None:
    layer = nn.Linear(8, 4).to(torch.bfloat16)
    assert prune_weights(layer, sparsity=0.5) == {"weight": 0.5}
    assert layer.weight.dtype == torch.bfloat16 and int((layer.weight == 0).sum()) == 16
    model, twin = tiny_llama(), tiny_llama()
    found = prune_weights(model, "magnitude", sparsity=0.5)
    shrink(twin, {"steps": [{"prune": {"what": "weights", "method": "magnitude", "sparsity": 0.5}}]}, progress=False)
    assert len(found) == 28 and "lm_head.weight" not in found
    assert all(torch.equal(t, twin.state_dict()[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("keys", "error", "match"),
    [
        ({}, RecipeError, "exactly one"),
        ({"sparsity": 0.5, "threshold": 0.1}, RecipeError, "exactly one"),
        ({"sparsity": 0.5, "importance": "wanda"}, RecipeError, "calibration data"),
        ({"sparsity": 0.5, "importance": "magnitud"}, RecipeError, "did you mean 'magnitude'"),
        ({"sparsity": 0.5, "granularity": "layer"}, RecipeError, "granularity"),
        ({"sparsity": 0.5, "targets": "Linear"}, RecipeError, "is a list"),
        ({"sparsity": 0.5, "targets": ["LayerNorm"]}, RecipeError, "means no weight"),
        ({"sparsity": 0.5, "importance": lambda p: p.mean()}, RecipeError, "of shape"),
        ({"sparsity": 0.5, "importance": lambda p: p / 0}, CalibrationError, "NaN"),
    ],
)
def test_bad_requests_change_nothing(keys: dict[str, Any], error: type[Exception], match: str) -> None:
    model = Everything()
    with torch.no_grad():
        model.head.weight[0, 0] = 0.0
    before = copy.deepcopy(model.state_dict())
    targets = {"targets": ["head"]} if "importance" in keys else {}
    with pytest.raises(error, match=match):
        prune_weights(model, **{**targets, **keys})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
