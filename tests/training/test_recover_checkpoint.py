"""From a compressed folder to a recovered one, in Python and by `hf-shrink recover`."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TEXT, tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM

from hf_shrink import CheckpointError, load_adapter, recover, recover_checkpoint, shrink_checkpoint
from hf_shrink.checkpoint.measured import load_measured
from hf_shrink.cli import main

SETTINGS = {
    "calibration": {"samples": 8, "length": 24},
    "evaluation": {"samples": 6, "length": 24, "metrics": ["perplexity", "kl_divergence"]},
}
FOUND = "with-adapter"
MODULE = "hf_shrink.training.recovery.checkpoint"
DEPTH = {"prune": {"what": "depth", "method": "block_influence", "blocks": 1, "refit": False}}
THEIRS = "# Dense\n\n## Limitations\nIt has never seen a mountain.\n"
PACK = {"quantize": {"method": "rtn", "scheme": "W2A16", "group_size": 16}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, the same with a block less, and packed, in one folder."""
    folder = tmp_path_factory.mktemp("recover")
    tiny_llama(num_hidden_layers=3).save_pretrained(folder / "dense")
    tiny_tokenizer().save_pretrained(folder / "dense")
    (folder / "book.txt").write_text(TEXT * 4)
    (folder / "dense" / "README.md").write_text(THEIRS)
    for name, step in (("pruned", DEPTH), ("packed", PACK)):
        shrink_checkpoint(folder / "dense", folder / name, {**SETTINGS, "steps": [step]}, progress=False)
    return folder


def kl(folder: Path) -> float:
    record = json.loads((folder / "shrink.json").read_text())
    return record["report"]["evaluation"]["compressed"]["kl_divergence"]["value"]


def test_the_command_writes_a_whole_folder_in_place_of_the_old_one(folders: Path, capsys) -> None:
    before = kl(folders / "pruned")
    arguments = ["recover", str(folders / "pruned"), "--quiet", "--steps", "30", "--rank", "4"]
    arguments += ["--data", str(folders / "book.txt"), "--samples", "40", "--length", "24", "--learning-rate", "0.005"]
    arguments += ["--task", "0.25"]
    assert main([*arguments, "--output", str(folders / "pruned")]) == 2
    assert main([*arguments, "--output", str(folders / "pruned"), "--overwrite"]) == 0
    assert "recovery (lora, 30 steps" in capsys.readouterr().out
    found = folders / "pruned"
    assert kl(found) != before  # measured again
    names = {path.name for path in found.iterdir()}
    assert names >= {"model.safetensors", "config.json", "tokenizer.json", "README.md", "shrink.json", "report.html"}
    assert not [path for path in folders.iterdir() if path.name.startswith(".")]
    record = json.loads((found / "shrink.json").read_text())
    (note,) = [note for note in record["report"]["notes"] if "recovery (lora" in note]
    assert "the loss on held-out data" in note and record["plan"]["stacks"]
    seconds = record["report"]["seconds"]
    assert seconds["recover"] > 0 and seconds["total"] >= seconds["plan"] + seconds["recover"]
    prompts = [texts["prompt"] for texts in record["report"]["completions"]]
    assert len(prompts) == len(set(prompts)) > 0, "of the recovered model, not of both"
    card = (found / "README.md").read_text()
    assert (
        "hf-shrink recover again" in card
        and "--data book.txt --steps 30" in card
        and "--task 0.25" in card
        and str(folders) not in card
    )
    assert (found / "README.dense.md").read_text() == THEIRS and card.count("never seen a mountain") == 1
    model = AutoModelForCausalLM.from_pretrained(found)
    assert len(model.model.layers) == 2 and not [n for n in model.state_dict() if "lora" in n]


def test_an_adapter_lies_beside_packed_weights(folders: Path) -> None:
    options = {"steps": 20, "rank": 4, "samples": 16, "length": 24, "learning_rate": 0.01}
    found = recover_checkpoint(folders / "packed", folders / "with-adapter", method="lora", progress=False, **options)
    assert found.adopted and kl(folders / "with-adapter") < kl(folders / "packed")
    packed, again = (AutoModelForCausalLM.from_pretrained(folders / name) for name in ("packed", "with-adapter"))
    for name, tensor in packed.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        without = again(ids).logits
        assert not torch.allclose(load_adapter(again, folders / "with-adapter" / "adapter")(ids).logits, without)
    measured = load_measured(folders / "with-adapter").model
    with torch.no_grad():
        torch.testing.assert_close(
            measured(ids).logits, load_adapter(packed, folders / "with-adapter/adapter")(ids).logits
        )
    with pytest.raises(CheckpointError, match="adapter already"):
        recover_checkpoint(folders / "with-adapter", folders / "again", steps=1, progress=False)
    before, after = (json.loads((folders / name / "shrink.json").read_text())["report"] for name in ("packed", FOUND))
    assert any("load_adapter" in note for note in after["notes"])
    adapter = (folders / FOUND / "adapter" / "adapter_model.safetensors").stat().st_size
    assert after["bytes_after"] == before["bytes_after"] + adapter
    assert 'load_adapter(model, name, subfolder="adapter")' in (folders / FOUND / "README.md").read_text()
    anew = load_adapter(AutoModelForCausalLM.from_pretrained(folders / FOUND), folders / FOUND, subfolder="adapter")
    with torch.no_grad():
        torch.testing.assert_close(measured(ids).logits, anew(ids).logits)


def test_scales_of_a_folder_without_a_record(folders: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    AutoModelForCausalLM.from_pretrained(folders / "packed").save_pretrained(plain)
    tiny_tokenizer().save_pretrained(plain)
    (plain / "shrink.json").unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match="baseline"):
        recover_checkpoint(plain, tmp_path / "out", steps=2, progress=False)
    options = {"steps": 20, "samples": 16, "length": 24, "learning_rate": 0.01, "data": str(folders / "book.txt")}
    found = recover_checkpoint(plain, tmp_path / "out", baseline=folders / "dense", progress=False, **options)
    assert found.adopted and "(scales, 20 steps" in found.note
    assert (tmp_path / "out" / "model.safetensors").is_file() and not (tmp_path / "out" / "shrink.json").exists()


def test_run_refuses_a_recovery_that_cannot_work_before_it_begins(folders: Path, tmp_path: Path, capsys) -> None:
    recipe = tmp_path / "tokens.yaml"
    recipe.write_text("steps:\n  - prune: {what: vocabulary, method: seen}\n")
    run = ["run", str(folders / "dense"), "--output", str(tmp_path / "out"), "--quiet"]
    assert main([*run, "--recipe", str(recipe), "--recover", "1"]) == 2
    assert "cannot be recovered" in capsys.readouterr().err
    assert main([*run, "--recover", "-1"]) == 2
    assert "minutes must be above 0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_one_command_shrinks_and_recovers(folders: Path, tmp_path: Path, capsys) -> None:
    run = ["run", str(folders / "dense"), "--output", str(tmp_path / "out"), "--quiet", "--effort", "fast"]
    few = ["--set=evaluation.samples=4", "--set=evaluation.length=24", "--calibration", str(folders / "book.txt")]
    assert main([*run, *few, "--recover", "0.02"]) == 0
    assert "recovery (scales" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "shrink.json").read_text())
    assert record["source"] == str(folders / "dense") and record["report"]["seconds"]["recover"] > 0


def test_a_recovery_after_a_plan_is_measured_as_the_run_was(folders: Path, tmp_path: Path, monkeypatch) -> None:
    """And learns from the data that the plan was calibrated on; a plan's record has no recipe that says either."""
    found: list[dict[str, Any]] = []

    def recovers(model: Any, **given: Any) -> Any:
        found.append(given)
        return recover(model, **given)

    monkeypatch.setattr(sys.modules[MODULE], "recover", recovers)
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("A quick brown fox looks over the lazy dog, who is asleep under a tree by the river. " * 60)
    plan = tmp_path / "plan.json"
    recipe = {
        **SETTINGS,
        "calibration": {"samples": 8, "length": 24, "data": str(folders / "book.txt")},
        "steps": [PACK],
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert main(["plan", str(folders / "dense"), "--recipe", f"{tmp_path / 'recipe.yaml'}", "--json", str(plan)]) == 0
    run = ["run", str(folders / "dense"), "--recipe", str(plan), "--quiet", "--recover", "0.02"]
    assert main([*run, "--output", str(tmp_path / "out"), "--evaluation", str(held_out)]) == 0
    evaluation = json.loads((tmp_path / "out" / "shrink.json").read_text())["report"]["evaluation"]
    assert "held_out.txt" in json.dumps(evaluation)
    assert found[0]["data"] == str(folders / "book.txt") and "quick brown fox" in " ".join(found[0]["exclude"])
    assert main([*run, "--output", str(tmp_path / "none"), "--evaluation", "none"]) == 0
    assert not json.loads((tmp_path / "none" / "shrink.json").read_text())["report"]["evaluation"]


def test_the_command_measures_on_what_it_is_told_to(folders: Path, tmp_path: Path, capsys) -> None:
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("A quick brown fox looks over the lazy dog, who is asleep under a tree by the river. " * 60)
    arguments = ["recover", str(folders / "packed"), "--quiet", "--steps", "20", "--learning-rate", "0.01"]
    arguments += ["--data", str(folders / "book.txt"), "--samples", "16", "--length", "24"]
    reports = []
    for name in (str(held_out), "none"):
        out = tmp_path / Path(name).stem
        assert main([*arguments, "--output", str(out), "--evaluation", name]) == 0
        reports.append(json.loads((out / "shrink.json").read_text())["report"])
    told, nothing = reports
    assert "held_out.txt" in json.dumps(told["evaluation"]["data"])
    assert told["evaluation"]["compressed"].keys() >= {"perplexity", "kl_divergence"}
    # Not those of the model before it was recovered.
    assert nothing["recoveries"] and not nothing["evaluation"] and not nothing["completions"]
    assert main([*arguments, "--output", str(tmp_path / "no"), "--evaluation", "no-such-data"]) == 2
    assert "no-such-data" in capsys.readouterr().err


def test_figures_need_a_record_to_be_written_to(folders: Path, tmp_path: Path, capsys) -> None:
    small = tmp_path / "small"
    shutil.copytree(folders / "dense", small)
    arguments = ["recover", str(small), "--baseline", str(folders / "dense"), "--quiet", "--steps", "1"]
    arguments += ["--data", str(folders / "book.txt"), "--samples", "4", "--length", "24", "--output"]
    assert main([*arguments, str(tmp_path / "told"), "--evaluation", str(folders / "book.txt")]) == 2
    assert "no shrink.json, where figures would be written" in capsys.readouterr().err
    assert main([*arguments, str(tmp_path / "nothing"), "--evaluation", "none"]) == 0


@pytest.mark.parametrize("output", ["dense", "."])
def test_the_dense_model_is_not_overwritten(output: str, folders: Path) -> None:
    (folders / "config.json").write_text("{}")  # so that the folder around them looks like a model
    before = (folders / "dense" / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="would be overwritten"):
        recover_checkpoint(folders / "packed", folders / output, overwrite=True, steps=1, progress=False)
    assert (folders / "dense" / "model.safetensors").read_bytes() == before
    (folders / "config.json").unlink()
