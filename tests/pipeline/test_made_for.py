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

from hf_shrink import ArchitectureError, Plan, RecipeError, make_plan, shrink
from hf_shrink.cli import main

RTN: dict[str, Any] = {"dtype": "bfloat16", "steps": [{"quantize": {"method": "rtn", "group_size": 8}}]}


def plan_for(model: PreTrainedModel) -> Plan:
    return Plan.from_json(make_plan(model, RTN, progress=False).to_json())


def refused(model: PreTrainedModel, plan: Plan, match: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan is refused, before there is data, and the model stays as it is."""
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr("hf_shrink.pipeline.shrinking.Job.data", lambda job: pytest.fail("made data"))
    with pytest.raises(ArchitectureError, match=match):
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
