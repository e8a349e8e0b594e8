"""A plan for another model is refused before anything is made or changed; an edited one is carried out as it says."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.cases_mixtures import MIXTURES
from tiny import tiny_llama, tiny_tokenizer
from transformers import PreTrainedModel

from hf_shrink import ArchitectureError, Plan, RecipeError, make_plan, shrink, shrink_checkpoint
from hf_shrink.cli import main
from hf_shrink.errors import ShrinkError
from hf_shrink.plan import HiddenPlan
from hf_shrink.sparsity import Amount

RTN: dict[str, Any] = {"dtype": "bfloat16", "steps": [{"quantize": {"method": "rtn", "group_size": 8}}]}


def plan_for(model: PreTrainedModel) -> Plan:
    return Plan.from_json(make_plan(model, RTN, progress=False).to_json())


def refused(
    model: PreTrainedModel,
    plan: Plan,
    match: str,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[ShrinkError] = ArchitectureError,
) -> None:
    """The plan is refused, before there is data, and the model stays as it is."""
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr("hf_shrink.pipeline.shrinking.Job.data", lambda job: pytest.fail("made data"))
    with pytest.raises(kind, match=match):
        shrink(model, plan, progress=False)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(after[n].dtype == t.dtype and torch.equal(after[n], t) for n, t in before.items())


@pytest.mark.parametrize(("theirs", "ours"), [(2, 3), (3, 2)])
def test_another_number_of_blocks(theirs: int, ours: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_for(tiny_llama(num_hidden_layers=theirs))
    words = rf"a model with {theirs} blocks in decoder, and this one has {ours}; make the plan anew"
    refused(tiny_llama(num_hidden_layers=ours), plan, words, monkeypatch)


def test_a_plan_that_does_not_say_how_many_blocks_there_were(monkeypatch: pytest.MonkeyPatch) -> None:
    old = replace(plan_for(tiny_llama(num_hidden_layers=3)), depths={})
    shrink(tiny_llama(num_hidden_layers=3), old, progress=False)
    words = r"names model\.layers\.2\.\S+ and 6 more, which this model does not have"
    refused(tiny_llama(num_hidden_layers=2), old, words, monkeypatch)


def test_experts_and_types(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_for(MIXTURES["qwen3_moe"]())
    shrink(MIXTURES["qwen3_moe"](), plan, progress=False)
    refused(MIXTURES["qwen3_moe"](num_experts=4), plan, r"experts\.4\.", monkeypatch)
    refused(MIXTURES["olmoe"](), plan, "for a 'qwen3_moe' model, and this one is 'olmoe'", monkeypatch)


@pytest.mark.parametrize("said", [{"formats": {}}, {"schemes": {}, "formats": {"lm_head": "NF4"}}])
def test_weights_that_are_stored_by_no_method(said: dict[str, Any]) -> None:
    plan = replace(plan_for(tiny_llama()), method=None, **said)
    with pytest.raises(RecipeError, match=rf"how {len(plan.bits)} weights are stored, but not by which method"):
        shrink(tiny_llama(), plan, progress=False)


@pytest.mark.parametrize("command", ["plan", "run"])
def test_the_command_line(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for blocks in (2, 3):
        tiny_llama(num_hidden_layers=blocks).save_pretrained(tmp_path / str(blocks))
        tiny_tokenizer().save_pretrained(tmp_path / str(blocks))
    plan_for(tiny_llama(num_hidden_layers=2)).to_json(tmp_path / "plan.json")
    more = ["--output", str(tmp_path / "out")] if command == "run" else []
    assert main([command, str(tmp_path / "3"), "--recipe", str(tmp_path / "plan.json"), "--quiet", *more]) == 2
    said = capsys.readouterr()
    assert "2 blocks in decoder, and this one has 3" in said.err and not said.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3", "plan.json"]


@pytest.mark.parametrize(
    ("block", "match"),
    [
        ({"channels": [0, 1, 9999]}, "layers.3.mlp: kept channels must be ascending whole numbers below 80"),
        ({"channels": [0, 0, 1]}, "each once"),
        ({"channels": []}, "nothing would be left of its channels"),
        ({"query_heads": [0, 1, 2]}, "same number of query heads in every KV group"),
        ({"query_heads": [0, 99]}, "kept query heads must be ascending whole numbers below 6"),
        ({"cross_heads": [0]}, "no such attention"),
        ({"experts": [0]}, "no experts that could be removed"),
        ({"expert_channels": [[0]]}, "no experts whose channels"),
        ({"removed": ["mpl"]}, "no part of model.layers.3 is called 'mpl'; did you mean 'mlp'"),
        ({"removed": ["mpl"], "channels": [0]}, "did you mean 'mlp'"),
        ({"removed": ["path"]}, "no part of model.layers.3 is called 'path'"),
    ],
)
def test_what_a_block_cannot_lose(block: dict[str, Any], match: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the last block, which is reached last."""
    width = {"prune": {"what": "width", "method": "magnitude", "ratio": 0.2, "refit": False}}
    plan = make_plan(tiny_llama(), {"steps": [width, *RTN["steps"]]}, progress=False)
    data = json.loads(plan.to_json())
    data["stacks"]["decoder"]["blocks"]["3"] = block
    refused(tiny_llama(), Plan.from_json(data), match, monkeypatch)


def test_experts_that_a_mixture_cannot_lose(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(MIXTURES["mixtral"](), RTN, progress=False)
    for fewer, match in (
        ({"experts": "0-1,9"}, "kept experts must be ascending whole numbers below"),
        ({"experts": "0-1", "merges": [[1, 0, 0.5]]}, "merges removed experts into kept ones"),
        ({"expert_channels": ["0-7"]}, "the plan says of 1 which"),
    ):
        refused(MIXTURES["mixtral"](), edited(plan, "0-1", dict.fromkeys("01", fewer)), match, monkeypatch)


@pytest.mark.parametrize(
    "path", ["model.layers.3.input_layernorm", "model.norm", "model.layers.3.mlp", "model.rotary_emb", ""]
)
def test_what_is_no_matrix_cannot_be_stored_in_few_bits(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_for(tiny_llama())
    scheme = next(iter(plan.schemes.values()))
    wrong = replace(plan, schemes={**plan.schemes, path: scheme})
    refused(tiny_llama(), wrong, f"names {path}, which is neither a matrix nor a plain embedding", monkeypatch)


def test_what_cannot_get_zeros_or_another_format(monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = {"prune": {"what": "weights", "method": "magnitude", "sparsity": 0.5}}
    plan = make_plan(tiny_llama(), {"steps": [zeros]}, progress=False)
    other = replace(plan, weights=None, formats={"model.embed_tokens": "NF4"}, method="bitsandbytes")
    assert plan.weights is not None
    for path, amount, match, kind in (
        ("model.norm.weight", Amount(0.5), "names model.norm.weight, which is no weight here", ArchitectureError),
        ("model.layers.3.mlp.up_proj.bias", Amount(0.5), "which is no weight here", ArchitectureError),
        ("model.layers.3.mlp.up_proj.weight", Amount(pattern="3:7"), "3:7 does not divide rows of 48", RecipeError),
    ):
        wrong = replace(plan, weights=replace(plan.weights, amounts={**plan.weights.amounts, path: amount}))
        refused(tiny_llama(), wrong, match, monkeypatch, kind)
    why = "embed_tokens cannot be stored as NF4: bitsandbytes takes Linear only"
    refused(tiny_llama(), other, why, monkeypatch, RecipeError)


def test_a_stream_that_cannot_be_cut_so(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_for(tiny_llama())
    wide, missing = HiddenPlan("decoder", 99, "pca"), HiddenPlan("encoder", 8, "pca")
    refused(tiny_llama(), replace(plan, hidden=wide), "cuts a stream of 48 channels to 99", monkeypatch)
    refused(tiny_llama(), replace(plan, hidden=missing), "stream of 'encoder', which this model does not", monkeypatch)


def test_a_folder_is_not_touched_by_a_plan_that_does_not_fit(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    plan = edited(plan_for(tiny_llama()), "0-3", {"3": {"channels": [0, 99]}})
    with pytest.raises(ArchitectureError, match="below 80"):
        shrink_checkpoint(tmp_path / "model", tmp_path / "out", plan, tokenizer=tiny_tokenizer(), progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_group_size_that_does_not_divide_is_told_as_a_recipe_does() -> None:
    plan = plan_for(tiny_llama())
    path = "model.layers.0.self_attn.q_proj"
    odd = replace(plan, schemes={**plan.schemes, path: replace(plan.schemes[path], group_size=7)})
    model: Any = shrink(tiny_llama(), odd, progress=False)
    assert model.get_submodule(path).scheme.group_size == model.shrink_record.plan.schemes[path].group_size == 6
    assert "group size 7 does not divide the width of 1 weights; they use 6" in " ".join(model.shrink_report.notes)
    assert model.shrink_record.plan.schemes["model.layers.0.self_attn.k_proj"].group_size == 8


def edited(plan: Plan, kept: str, blocks: dict[str, Any] | None = None) -> Plan:
    """The plan of somebody who takes blocks or experts out in its file, and leaves everything else."""
    data = json.loads(plan.to_json())
    data["stacks"] = {"decoder": {"kept": kept, "blocks": blocks or {}}}
    return Plan.from_json(json.dumps(data))


@pytest.mark.parametrize(("kept", "left", "gone"), [("0,2-3", (0, 2, 3), 1), ("0-2", (0, 1, 2), 3)])
def test_what_an_edited_plan_says_of_a_block_that_it_removes_is_left_out(
    kept: str, left: tuple[int, ...], gone: int
) -> None:
    zeros = {"what": "weights", "method": "magnitude", "sparsity": 0.5, "ignore": ["re:.*layers.2"]}
    few = {"method": "rtn", "group_size": 8, "overrides": {"re:.*layers.2": {"scheme": "W8A16"}}}
    plan = make_plan(tiny_llama(), {"steps": [{"prune": zeros}, {"quantize": few}]}, progress=False)
    whole: Any = shrink(tiny_llama(), plan, progress=False)
    model: Any = shrink(tiny_llama(), edited(plan, kept), progress=False)
    for block, source in zip(model.model.layers, left, strict=True):
        expected = whole.model.layers[source].state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in block.state_dict().items())
    assert not [path for path in model.shrink_record.plan.schemes if f".{gone}." in path]
    assert f"the plan removes model.layers.{gone}.self_attn.q_proj and 6 more" in " ".join(model.shrink_report.notes)


def test_what_an_edited_plan_says_of_an_expert_that_it_removes_is_left_out() -> None:
    build = MIXTURES["mixtral"]
    plan = make_plan(build(), {"steps": [{"quantize": {"method": "rtn", "group_size": 8}}]}, progress=False)
    fewer = {index: {"experts": "0,2-3"} for index in "01"}
    whole, model = (shrink(build(), p, progress=False) for p in (plan, edited(plan, "0-1", fewer)))
    for block in range(2):
        for place, source in enumerate((0, 2, 3)):
            for name in ("w1", "w2", "w3"):
                path = f"model.layers.{block}.mlp.experts"
                kept = model.get_submodule(f"{path}.{place}.{name}").weight
                assert torch.equal(kept, whole.get_submodule(f"{path}.{source}.{name}").weight)
