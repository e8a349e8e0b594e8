"""Mixtures of experts in a process that never imports hf_shrink: right logits, or a loud failure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from checkpoint.saved import Saved, logits_of, run_stock
from conformance.cases_mixtures import MIXTURES
from stock import Stock
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from hf_shrink import shrink
from hf_shrink.checkpoint.targets import matches
from hf_shrink.errors import RecipeError

EXPERTS = r"re:.*mlp\.experts\..*"
DOWN = r"re:.*mlp\.experts\..*(?:down_proj|w2)$"
W8 = {"scheme": "W8A16", "group_size": 16}
PORTABLE: dict[str, dict[str, Any]] = {
    "w4": {"scheme": "W4A16", "group_size": 16},
    "w3 by channel": {"scheme": "W3A16", "strategy": "channel"},
    "w4 experts": {**W8, "overrides": {EXPERTS: {"scheme": "W4A16"}}},
    "only experts": {**W8, "targets": [EXPERTS]},
    "fp8": {"scheme": "FP8A16"},
    "fp8 experts": {"scheme": "W4A16", "group_size": 16, "overrides": {EXPERTS: {"scheme": "FP8A16"}}},
}
# Part of the reason.
OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "asymmetric": ({**W8, "overrides": {EXPERTS: {"symmetric": False}}}, "zero points"),
    "asymmetric by tensor": ({"scheme": "W8A16", "strategy": "tensor", "symmetric": False}, "zero points"),
    "two schemes": ({**W8, "group_size": 8, "overrides": {DOWN: {"scheme": "W4A16"}}}, "several schemes"),
    "int8 inputs": ({"scheme": "W8A8"}, "int8 inputs"),
    "dense experts": ({**W8, "ignore": [EXPERTS]}, "stays dense"),
    "one dense matrix": ({**W8, "ignore": [DOWN]}, "stays dense"),
}
CASES = {("mixtral", row): step for row, step in PORTABLE.items()}
CASES |= {("mixtral", row): step for row, (step, _) in OTHERS.items()}
CASES |= {("qwen3_moe", row): OTHERS[row][0] for row in ("asymmetric by tensor", "two schemes", "one dense matrix")}
CASES[("qwen3_moe", "fp8")] = PORTABLE["fp8"]
CASES |= {
    (family, row): PORTABLE[row] for family in ("qwen3_moe", "qwen2_moe", "olmoe") for row in ("w4", "w4 experts")
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, stock_process: Stock) -> dict[tuple[str, str], Saved]:
    root = tmp_path_factory.mktemp("mixtures")
    saved = {}
    for (family, row), step in CASES.items():
        recipe = {"portable": row in PORTABLE, "steps": [{"quantize": {"method": "rtn", **step}}]}
        model: Any = shrink(MIXTURES[family](), recipe, progress=False)
        folder = root / f"{family}_{row.replace(' ', '_')}"
        model.save_pretrained(folder)
        reasons = tuple(model.shrink_report.not_portable_because)
        saved[f"{family} {row}"] = Saved(folder, type(model).__name__, logits_of(model), reasons)
    found = run_stock(saved, stock_process)
    return {case: found[" ".join(case)] for case in CASES}


@pytest.mark.parametrize("case", [case for case in CASES if case[1] in PORTABLE], ids=" ".join)
def test_stock_unpacks_the_experts(case: tuple[str, str], outcomes: dict[tuple[str, str], Saved]) -> None:
    row = outcomes[case]
    assert row.stock_error is None and row.reasons == ()
    assert (row.stock_logits - row.logits).abs().max() < 1e-4 * row.logits.abs().max()
    block = row.config()["quantization_config"]
    assert "dequantize" not in block
    targets = [target for group in block["config_groups"].values() for target in group["targets"]]
    assert any(target.startswith("re:") and "experts" in target for target in targets)
    assert matches("model.layers.0.mlp.gate", [ignored for ignored in block["ignore"] if ignored.startswith("re:")])


@pytest.mark.parametrize("case", [case for case in CASES if case[1] in OTHERS], ids=" ".join)
def test_stock_refuses_the_others(case: tuple[str, str], outcomes: dict[tuple[str, str], Saved]) -> None:
    row = outcomes[case]
    assert row.stock_logits is None and "import hf_shrink" in str(row.stock_error)
    assert any(OTHERS[case[1]][1] in reason for reason in row.reasons)
    again = getattr(transformers, row.kind).from_pretrained(row.folder)
    # Products differ in their last bits with where a dense weight happens to lie in memory.
    assert (logits_of(again) - row.logits).abs().max() < 1e-5 * row.logits.abs().max()


@pytest.mark.parametrize("row", OTHERS)
def test_portable_recipes_do_not_get_there(row: str) -> None:
    with pytest.raises(RecipeError, match=f"not portable: .*{OTHERS[row][1]}"):
        shrink(MIXTURES["mixtral"](), {"steps": [{"quantize": {"method": "rtn", **OTHERS[row][0]}}]}, progress=False)


def test_experts_share_one_group_size_though_their_widths_differ() -> None:
    model: Any = shrink(
        MIXTURES["qwen3_moe"](), {"steps": [{"quantize": {"method": "rtn", "group_size": 16}}]}, progress=False
    )
    sizes = {
        path.split(".")[4]: module.scheme.group_size
        for path, module in model.named_modules()
        if hasattr(module, "scheme") and "layers.0" in path
    }
    assert sizes == {"q_proj": 16, "k_proj": 16, "v_proj": 16, "o_proj": 16, "experts": 12}
    assert any("one group size, 12, for all experts" in note for note in model.shrink_report.notes)


def test_experts_that_no_table_knows_stay_dense_and_say_so(tmp_path: Path) -> None:
    config = DeepseekV3Config(
        vocab_size=320,
        hidden_size=48,
        intermediate_size=80,
        moe_intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        q_lora_rank=24,
        qk_rope_head_dim=8,
        v_head_dim=16,
        qk_nope_head_dim=8,
    )
    step = {"quantize": {"method": "rtn", **W8}}
    with pytest.raises(RecipeError, match="stays dense: beside packed weights"):
        shrink(DeepseekV3ForCausalLM(config).eval(), {"steps": [step]}, progress=False)
    model: Any = shrink(DeepseekV3ForCausalLM(config).eval(), {"portable": False, "steps": [step]}, progress=False)
    assert any("that nothing says how to take apart" in note for note in model.shrink_report.notes)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quantization_status"].startswith(
        "run `import hf_shrink`"
    )
    assert (logits_of(type(model).from_pretrained(tmp_path)) == logits_of(model)).all()
