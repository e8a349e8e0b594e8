"""The residual stream cut by recipe: exact where nothing is lost, refitted where something is, loaded by stock."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.saved import Saved, logits_of, run_stock
from stock import Stock
from surgery.test_hidden_cut import _scaled_embedding, low_rank, stream_of
from tiny import VOCABULARY, tiny_llama
from torch import Tensor, nn

from hf_shrink import make_plan, shrink
from hf_shrink.errors import ArchitectureError, CalibrationError
from hf_shrink.ops.linalg import refit_towards
from hf_shrink.plan import HiddenPlan, Plan
from hf_shrink.runtime import CompressedLinear


def tokens(batches: int = 4, rows: int = 4, length: int = 24, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    found = [{"input_ids": torch.randint(3, VOCABULARY, (rows, length), generator=generator)} for _ in range(batches)]
    found[0]["attention_mask"] = torch.ones(rows, length, dtype=torch.long)
    found[0]["attention_mask"][0, :5] = 0
    return found


def hidden(**keys: Any) -> dict[str, Any]:
    return {"prune": {"what": "hidden", "method": "pca", "ratio": 0.25, **keys}}


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


IDS = tokens(1, seed=9)[0]["input_ids"]
EVEN = {"tied": True, "even": True}


def built(tied: bool = False, even: bool = False, noise: float = 0.0, rank: int = 36) -> Any:
    """A model whose stream lies in a subspace; `noise`: how much of what it was without one is left."""
    model = tiny_llama(tie_word_embeddings=tied)
    if even:
        with torch.no_grad():
            model.model.norm.weight.fill_(1.3)
    whole = copy.deepcopy(model.state_dict())
    low_rank(model, rank)
    for name, value in model.state_dict().items():
        value.lerp_(whole[name], noise)
    return model


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("form", [{}, EVEN, {"tied": True}], ids=["apart", "tied", "untied"])
def test_a_stream_in_a_subspace_loses_nothing(form: dict[str, bool], refit: bool) -> None:
    model = built(**form)
    dense = logits(model, IDS)
    untie = form != EVEN
    shrink(model, {"steps": [hidden(refit=refit, untie=untie)]}, calibration=tokens(), progress=False)
    assert model.config.hidden_size == 36 and model.config.head_dim == 16
    assert relative(logits(model, IDS), dense) < 1e-3
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == (form == EVEN) == model.config.tie_word_embeddings
    assert model.lm_head.in_features == model.model.embed_tokens.embedding_dim == 36
    notes = " ".join(model.shrink_report.notes)
    assert ("11,520 parameters more" in notes) == (form == {"tied": True}) and "36 of 48 channels" in notes


def test_a_tied_head_under_an_uneven_norm_loses_little() -> None:
    model = tiny_llama(tie_word_embeddings=True)
    with torch.no_grad():
        model.model.norm.weight.uniform_(0.9, 1.1)
    low_rank(model, 36)
    dense = logits(model, IDS)
    shrink(model, {"steps": [hidden(refit=False, untie=False)]}, calibration=tokens(), progress=False)
    assert relative(logits(model, IDS), dense) < 0.05
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("tied", [False, True])
def test_the_refit_brings_it_nearer_to_the_dense_model(tied: bool) -> None:
    dense = built(tied=tied, even=tied, noise=0.1)
    errors = {}
    for refit in (False, True):
        model = copy.deepcopy(dense)
        shrink(model, {"steps": [hidden(refit=refit, untie=not tied)]}, calibration=tokens(12, 8), progress=False)
        errors[refit] = relative(logits(model, IDS), logits(dense, IDS))
    assert 0.01 < errors[True] < errors[False]


def test_bfloat16_stays_bfloat16_and_near() -> None:
    model = built().to(torch.bfloat16)
    dense = logits(model.float(), IDS)
    model.to(torch.bfloat16)
    shrink(model, {"steps": [hidden()]}, calibration=tokens(), progress=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert relative(logits(model.float(), IDS), dense) < 0.1


RTN = {"quantize": {"method": "rtn", "scheme": "W8A16", "group_size": 12}}
DEPTH = {"prune": {"what": "depth", "method": "block_influence", "blocks": 1}}
WIDTH = {"prune": {"what": "width", "method": "magnitude", "ratio": 0.1, "units": "mlp"}}
ROWS: dict[str, tuple[Any, list[dict[str, Any]]]] = {
    "apart": (built, [hidden()]),
    "tied": (lambda: built(tied=True), [hidden(untie=False)]),
    "untied": (lambda: built(tied=True), [hidden(untie=True)]),
    "scaled": (_scaled_embedding, [hidden(refit=False)]),
    "in few bits": (built, [DEPTH, hidden(), WIDTH, RTN]),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, stock_process: Stock) -> dict[str, tuple[Any, Saved]]:
    root = tmp_path_factory.mktemp("hidden")
    models, saved = {}, {}
    for row, (build, steps) in ROWS.items():
        given = tokens()
        if row == "scaled":
            given = [{"input_ids": batch["input_ids"] % 290 + 3} for batch in given]
        models[row] = shrink(build(), {"steps": steps}, calibration=given, progress=False)
        models[row].save_pretrained(root / row.replace(" ", "_"))
        saved[row] = Saved(root / row.replace(" ", "_"), type(models[row]).__name__, logits_of(models[row]), ())
    found = run_stock(saved, stock_process)
    return {row: (models[row], found[row]) for row in ROWS}


@pytest.mark.parametrize("row", ROWS)
def test_stock_loads_the_narrower_model(row: str, outcomes: dict[str, tuple[Any, Saved]]) -> None:
    model, saved = outcomes[row]
    report = model.shrink_report
    assert report.portable and saved.stock_error is None
    assert (saved.stock_logits - saved.logits).abs().max() < 1e-4 * saved.logits.abs().max()
    assert saved.config()["hidden_size"] == model.config.hidden_size < 48
    assert "head_dim" in saved.config() and saved.config().get("hf_shrink", {}).get("shapes") == {}
    assert report.parameters_after < 0.9 * report.parameters_before
    settings = {"do_sample": False, "max_new_tokens": 4, "attention_mask": torch.ones_like(IDS)}
    ids = IDS % 290 + 3
    assert torch.equal(model.generate(ids, **settings), model.generate(ids, use_cache=False, **settings))


def test_quantization_knows_the_new_widths(outcomes: dict[str, tuple[Any, Saved]]) -> None:
    model = outcomes["in few bits"][0]
    packed = {path: m for path, m in model.named_modules() if isinstance(m, CompressedLinear)}
    assert len(packed) == 3 * 7 and model.config.num_hidden_layers == 3
    assert packed["model.layers.1.self_attn.q_proj"].in_features == 36
    assert packed["model.layers.1.self_attn.q_proj"].scheme.group_size == 12
    assert packed["model.layers.2.mlp.down_proj"].out_features == 36


def test_a_plan_does_it_again(tmp_path: Path) -> None:
    recipe = {"steps": [hidden(untie=True), RTN]}
    left = make_plan(built(tied=True), {"steps": [hidden()]}, calibration=tokens(), progress=False)
    assert left.hidden == HiddenPlan("decoder", 36, "pca", {}, True, False)
    plan = make_plan(built(tied=True), recipe, calibration=tokens(), progress=False)
    assert plan.hidden == HiddenPlan("decoder", 36, "pca", {"untie": True}, True, True)
    assert "residual stream of 36 channels (pca, refitted), the head gets a weight of its own" in plan.summary()
    read = Plan.from_json(plan.to_json(tmp_path / "plan.json"))
    assert read == plan
    first = shrink(built(tied=True), recipe, calibration=tokens(), progress=False)
    again = shrink(built(tied=True), read, calibration=tokens(), progress=False)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))


def test_what_cannot_be_is_refused() -> None:
    plan = Plan("llama", hidden=HiddenPlan("decoder", 48, "pca"))
    with pytest.raises(ArchitectureError, match="48 channels to 48"):
        shrink(tiny_llama(), plan, calibration=tokens(), progress=False)
    with pytest.raises(ArchitectureError, match="'encoder', which this model does not have"):
        other = Plan("llama", hidden=HiddenPlan("encoder", 36, "pca"))
        shrink(tiny_llama(), other, calibration=tokens(), progress=False)
    broken = tokens()
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj.weight.data.fill_(1e25)
    model.model.layers[0].mlp.gate_proj.weight.data.fill_(1e25)
    with pytest.raises(CalibrationError):
        shrink(model, {"steps": [hidden()]}, calibration=broken, progress=False)


def test_least_squares_towards_given_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(200, n, generator=generator, dtype=torch.float64) for n in (5, 3))
    weight = torch.randn(3, 5, generator=generator)
    moment, cross = x.T @ x / 200, y.T @ x / 200
    penalty = 0.1 * moment.diagonal().mean()
    stacked = torch.cat([x, (200 * penalty).sqrt() * torch.eye(5, dtype=torch.float64)])
    targets = torch.cat([y, (200 * penalty).sqrt() * weight.double().T])
    expected = torch.linalg.lstsq(stacked, targets).solution.T
    torch.testing.assert_close(refit_towards(weight, cross, moment, 0.1), expected)
    assert stream_of(tiny_llama()).width == 48
