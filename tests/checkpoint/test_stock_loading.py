"""Every row of the table of formats in a process that never imports hf_shrink: right logits, or a loud failure."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoint.rows import FP8, IDS, ROWS, W4, W8A8, inner_linears, pack, spread
from checkpoint.saved import Saved, logits_of
from safetensors.torch import load_file
from stock import Stock
from tiny import tiny_llama
from tiny_readers import tiny_bart, tiny_blip, tiny_clip, tiny_t5, tiny_whisper
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, PreTrainedModel

from hf_shrink import shrink_checkpoint
from hf_shrink.checkpoint.save import model_portability
from hf_shrink.plan import Scheme

EIGHT = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
FEATURES = torch.randn(1, 16, 100, generator=torch.Generator().manual_seed(0))
PIXELS = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TOKENS = torch.tensor(IDS)
# A model, what is called on it first, and with what.
CALLS: dict[str, tuple[Callable[[], PreTrainedModel], str, dict[str, Any]]] = {
    "bart": (tiny_bart, "generate", {"input_ids": TOKENS, **EIGHT}),
    "t5": (tiny_t5, "generate", {"input_ids": TOKENS, **EIGHT}),
    "whisper": (tiny_whisper, "generate", {"input_features": FEATURES, **EIGHT}),
    "blip": (tiny_blip, "generate", {"pixel_values": PIXELS, **EIGHT}),
    "clip": (tiny_clip, "get_text_features", {"input_ids": TOKENS}),
}
PORTABLE = [name for name, row in ROWS.items() if row.stock in ("yes", "dequantize")]
OTHERS = [name for name in ROWS if name not in PORTABLE]


@pytest.mark.parametrize("name", PORTABLE)
def test_stock_gives_the_same_logits(name: str, stock_rows: dict[str, Saved]) -> None:
    row = stock_rows[name]
    assert row.stock_error is None
    difference = (row.stock_logits - row.logits).abs().max() / row.logits.abs().max()
    # Sums in another order can carry an input over the edge between two of its integers, which is then seen.
    rounds_inputs = any(group["input_activations"] for group in row.groups())
    assert difference < (0.05 if rounds_inputs else 1e-3)
    assert row.reasons == ()


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("scheme", [W4, FP8], ids=["w4", "fp8"])
def test_stock_runs_parts_before_the_model(name: str, scheme: Scheme, stock_process: Stock, tmp_path: Path) -> None:
    build, method, given = CALLS[name]
    dense: Any = build()
    spread(dense)
    model: Any = pack(dense, dict.fromkeys(inner_linears(dense), scheme))
    assert model_portability(model) == []
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        own = getattr(model, method)(**given)
    stock = stock_process.called(tmp_path, type(model).__name__, method, given)
    torch.testing.assert_close(stock, own if isinstance(own, torch.Tensor) else own.pooler_output)


@pytest.mark.parametrize("build", [CALLS["bart"][0], CALLS["clip"][0]], ids=["bart", "clip"])
def test_inputs_in_int8_are_not_portable_where_parts_run_before_the_model(build: Callable[[], PreTrainedModel]) -> None:
    model = build()
    reasons = model_portability(pack(model, dict.fromkeys(inner_linears(model), W8A8)))
    assert len(reasons) == 1 and "before stock" in reasons[0] and "rounds no inputs" in reasons[0]


@pytest.mark.parametrize("name", ["w8a8", "bert, w8a8"])
def test_stock_rounds_the_inputs_as_well(name: str, stock_rows: dict[str, Saved]) -> None:
    row = stock_rows[name]
    model = getattr(transformers, row.kind).from_pretrained(
        row.folder, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    unrounded = logits_of(model)
    assert (row.stock_logits - row.logits).norm() < 0.3 * (unrounded - row.logits).norm()


def test_values_are_stored_as_they_are(saved_rows: dict[str, Saved]) -> None:
    for name, kind, dtype in (("w8a8", "int-quantized", torch.int8), ("fp8", "float-quantized", torch.float8_e4m3fn)):
        row = saved_rows[name]
        assert row.config()["quantization_config"]["format"] == kind
        tensors = load_file(row.folder / "model.safetensors")
        path = "model.layers.1.mlp.up_proj."
        found = {n.removeprefix(path): t for n, t in tensors.items() if n.startswith(path)}
        assert set(found) == {"weight", "weight_scale"}
        assert found["weight"].dtype == dtype and found["weight"].shape == (80, 48)
    assert saved_rows["mixed with w8a8 and fp8"].config()["quantization_config"]["format"] == "mixed-precision"


@pytest.mark.parametrize("name", PORTABLE)
def test_dequantize_is_asked_for_only_where_stock_needs_it(name: str, saved_rows: dict[str, Saved]) -> None:
    block = saved_rows[name].config().get("quantization_config", {})
    assert block.get("dequantize", False) == (ROWS[name].stock == "dequantize")


@pytest.mark.parametrize("name", OTHERS)
def test_stock_fails_loudly_on_what_is_not_portable(name: str, stock_rows: dict[str, Saved]) -> None:
    row = stock_rows[name]
    assert row.stock_logits is None
    assert row.stock_error is not None
    if "quantization_status" in row.config()["quantization_config"]:
        assert "import hf_shrink" in row.stock_error
    assert any(ROWS[name].stock in reason for reason in row.reasons)


def test_a_tie_is_kept_only_where_both_sides_are_stored_alike(saved_rows: dict[str, Saved]) -> None:
    kept = {name: saved_rows[name].config().get("tie_word_embeddings") for name in ROWS if "head" in name}
    for name in ("t5, head apart", "t5, w8a8, head apart"):
        assert kept.pop(name) is True  # its config knows no other value
    assert {name for name, tied in kept.items() if tied} == {
        "embedding with tied head",
        "fp8 embedding with tied head",
        "embedding with tied head of another scheme",
    }
    assert all(tied is False for name, tied in kept.items() if "apart" in name)


@pytest.mark.parametrize(
    "step",
    [
        {"quantize": {"method": "rtn", "scheme": "W4A16", "group_size": 16, "head": "W8A16"}},
        {"quantize": {"method": "rtn", "scheme": "W4A16", "group_size": 16, "ignore": ["lm_head"]}},
        {"prune": {"what": "width", "ratio": 0.2, "method": "magnitude", "refit": False}},
    ],
    ids=["head packed", "head dense", "nothing packed"],
)
def test_a_tie_that_only_the_config_speaks_of_is_taken_out_of_it(
    step: dict[str, Any], tmp_path: Path, stock_process: Stock
) -> None:
    """transformers loads two stored weights that differ as they are, and says no more than a warning."""
    tiny_llama(num_hidden_layers=2).save_pretrained(tmp_path / "dense")
    file = tmp_path / "dense" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tie_word_embeddings": True}))
    out = tmp_path / "out"
    recipe = {"steps": [step], "evaluation": {"metrics": []}}
    report = shrink_checkpoint(tmp_path / "dense", out, recipe, progress=False)
    assert report.portable
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    ids = [[5, 7, 11, 13]]
    with torch.no_grad():
        ours = model(torch.tensor(ids)).logits
    torch.testing.assert_close(stock_process.logits(out, "LlamaForCausalLM", ids), ours, rtol=1e-3, atol=1e-3)
