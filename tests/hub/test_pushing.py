"""Push, pull back and push again: what arrives, how, and in which commits."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub.conftest import MEASURED, RUN, Screen
from hub.repositories import File, Repository
from hub.server import Fault, Server
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file
from stock import Stock
from tiny import tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM

import hf_shrink
from hf_shrink.checkpoint.staging import public, staged
from hf_shrink.cli import main
from hf_shrink.reporting.reproduce import is_hub_id

# Stock transformers, which knows the Hub by HF_ENDPOINT alone.
PULL = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
name, ids, target = sys.argv[1], eval(sys.argv[2]), sys.argv[3]
with torch.no_grad():
    logits = AutoModelForCausalLM.from_pretrained(name)(torch.tensor(ids))[0]
torch.save((logits, AutoTokenizer.from_pretrained(name)("The tide")["input_ids"]), target)
assert not any(module.split(".")[0] == "hf_shrink" for module in sys.modules)
"""
IDS = [list(range(5, 25))]


def test_run_pushes_and_stock_transformers_pulls_the_same_model(
    source: Path, hub: Server, tmp_path: Path, stock_process: Stock, screen: Screen
) -> None:
    output = tmp_path / "out"
    assert main(["run", str(source), "--output", str(output), *RUN, *MEASURED, "--push-to-hub", "tiny"]) == 0
    assert screen.read()[0].splitlines()[-1] == f"{hub.url}/me/tiny"

    logits, ids = pulled(hub, tmp_path, HF_HUB_DISABLE_XET="1")
    assert torch.equal(logits, stock_process.logits(output, "AutoModelForCausalLM", IDS))
    assert ids == tiny_tokenizer()("The tide")["input_ids"]


@pytest.mark.slow
def test_the_same_through_xet(
    hub: Server, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stock_process: Stock
) -> None:
    """By the real hf_xet, which keeps in a folder what it would send to its own servers."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.hub.xet = tmp_path / "xet"
    hub.faults += [Fault("GET .*/xet-write-token/", 503), Fault("POST .*/commit/", 503)]
    assert main(["push", str(finished), "tiny", "--quiet"]) == 0
    weights = hub.hub.repositories["me/tiny"].branches["main"][-1].files["model.safetensors"]
    assert weights.elsewhere is not None and weights.size == (finished / "model.safetensors").stat().st_size
    logits, _ = pulled(hub, tmp_path)
    assert torch.equal(logits, stock_process.logits(finished, "AutoModelForCausalLM", IDS))
    assert hub.count("PUT /lfs/") == hub.count("GET /lfs/") == 0


def pulled(hub: Server, folder: Path, **settings: str) -> tuple[torch.Tensor, list[int]]:
    """What another process, which never imports hf_shrink, makes of me/tiny: logits, and ids of a text."""
    target = folder / "pulled.pt"
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "cache")}
    environment |= {"OMP_NUM_THREADS": "1", **settings}
    command = [sys.executable, "-P", "-c", PULL, "me/tiny", str(IDS), str(target)]
    subprocess.run(command, env=environment, check=True, timeout=120)
    logits, ids = torch.load(target)
    return logits, ids


def test_everything_of_the_folder_arrives_and_nothing_of_this_machine(hub: Server, finished: Path) -> None:
    assert main(["push", str(finished), "me/tiny", "--private", "--quiet"]) == 0
    repository = hub.hub.repositories["me/tiny"]
    assert repository.private
    pushed = repository.files()
    here = {str(path.relative_to(finished)): path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert pushed.keys() == here.keys() | {".gitattributes"}
    changed = {name for name in here if pushed[name] != here[name]}
    assert changed <= {"shrink.json", "README.md"}
    assert hub.count("PUT /lfs/[0-9a-f]+/2") == 1  # the weights come in several parts

    record = json.loads(pushed["shrink.json"])
    assert record["source"] == "./source"
    assert not [name for name, content in pushed.items() if b"private-place" in content]
    card = ModelCard(pushed["README.md"].decode())
    assert card.data.license == "mit"
    assert "hf_shrink" in card.data.tags
    assert '"me/tiny"' in card.text


def test_a_folder_is_no_name_on_the_hub(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the record is read; and pushed it says only the folder's name."""
    place = source.parent.parent
    monkeypatch.chdir(place)
    relative = str(source.relative_to(place))
    assert main(["run", relative, "--output", str(tmp_path / "out"), *RUN, "--evaluation", "none"]) == 0
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out" / "shrink.json").read_text())
    assert record["source"] == str(source) and public(record)["source"] == f"./{source.name}"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model" not in card and "huggingface.co/private-place" not in card and str(source) not in card
    monkeypatch.chdir(place)
    model = hf_shrink.shrink(AutoModelForCausalLM.from_pretrained(relative), "w8-full", progress=False)
    assert model.shrink_record.source == f"./{relative}"
    assert not any(map(is_hub_id, (model.shrink_record.source, record["source"], public(record)["source"])))


def test_the_commit_says_what_came_of_it(hub: Server, finished: Path, folder: Path) -> None:
    assert main(["push", str(finished), "tiny", "--quiet"]) == 0
    commits = hub.hub.repositories["me/tiny"].branches["main"]
    assert len(commits) == 2  # the Hub's own, and one of ours
    assert re.match(r"source-w4a16: .* smaller.*perplexity", commits[-1].message)
    assert "hf_shrink" in commits[-1].description
    (folder / "extra.txt").write_text("more")
    assert main(["push", str(folder), "tiny", "--quiet", "--message", "Say more"]) == 0
    assert commits[-1].message == "Say more"


def test_pushing_the_same_again_makes_no_commit(hub: Server, finished: Path) -> None:
    assert main(["push", str(finished), "tiny", "--quiet"]) == 0
    sent = hub.received("PUT")
    assert main(["push", str(finished), "tiny", "--quiet"]) == 0
    assert len(hub.hub.repositories["me/tiny"].branches["main"]) == 2
    assert hub.received("PUT") == sent


def test_weights_of_an_earlier_push_do_not_stay_beside_new_ones(hub: Server, folder: Path) -> None:
    assert main(["push", str(folder), "tiny", "--quiet"]) == 0
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40KB")
    assert main(["push", str(folder), "tiny", "--quiet"]) == 0
    pushed = hub.hub.repositories["me/tiny"].files()
    assert "model.safetensors" not in pushed
    assert "model.safetensors.index.json" in pushed


def test_a_branch_is_made_and_main_stays(hub: Server, finished: Path, screen: Screen) -> None:
    dense = Repository("me/dense", private=False)
    dense.commit("main", "the dense model", "", {"model-00001-of-00002.safetensors": File(b"x", True)})
    hub.hub.repositories["me/dense"] = dense
    for _ in range(2):  # the branch is there the second time
        assert main(["push", str(finished), "me/dense", "--revision", "w4", "--quiet"]) == 0
        assert screen.read()[0].splitlines()[-1] == f"{hub.url}/me/dense/tree/w4"
    assert "shrink.json" in dense.files("w4")
    assert "model-00001-of-00002.safetensors" not in dense.files("w4")
    assert "shrink.json" not in dense.files("main")


def test_a_pull_request_opens_when_it_is_whole(hub: Server, finished: Path, screen: Screen) -> None:
    theirs = hub.hub.repositories["them/model"] = Repository("them/model", private=False)
    theirs.commit("main", "theirs", "", {"config.json": File(b"{}", False)})
    assert main(["push", str(finished), "them/model", "--pr", "--quiet"]) == 0
    assert screen.read()[0].splitlines()[-1] == f"{hub.url}/them/model/discussions/1"
    assert theirs.pulls[1]["status"] == "open"
    assert "shrink.json" in theirs.files("refs/pr/1")
    assert "shrink.json" not in theirs.files("main")


def test_what_training_leaves_is_not_pushed(hub: Server, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "training_args.bin").write_bytes(b"a pickle with hf_OwnerOwnerOwner in it")
    (folder / "checkpoint-10").mkdir()
    (folder / "checkpoint-10" / "model.safetensors").write_bytes(b"old")
    assert main(["push", str(folder), "tiny", "--quiet"]) == 0
    pushed = hub.hub.repositories["me/tiny"].files()
    assert not [name for name in pushed if "training_args" in name or "checkpoint" in name]
    shutil.rmtree(folder / "checkpoint-10")


def test_what_comes_after_the_model_is_pushed_pickled_or_not(
    hub: Server, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    modules = [("", "models.Transformer"), ("2_Dense", "models.Dense")]
    (folder / "modules.json").write_text(json.dumps([{"path": path, "type": kind} for path, kind in modules]))
    for name in ("2_Dense/pytorch_model.bin", "2_Dense/training_args.bin", "plots/pytorch_model.bin", "plots/in/a.pt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"weights")
    assert main(["push", str(folder), "dense-after", "--quiet"]) == 0
    pushed = hub.hub.repositories["me/dense-after"].files()
    assert "2_Dense/pytorch_model.bin" in pushed
    left = {"2_Dense/training_args.bin", "plots/pytorch_model.bin", "plots/in/a.pt"}
    assert not left & pushed.keys()
    with staged(folder) as (_, names):
        assert set(names) == left


def test_a_model_in_memory_takes_record_report_and_its_own_card_along(hub: Server) -> None:
    recipe = {"steps": [{"quantize": {"method": "rtn", "scheme": "W8A16"}}]}
    model = hf_shrink.shrink(tiny_llama(num_hidden_layers=2), recipe, progress=False, optimize=False)
    commit = model.push_to_hub("me/memory", tags=["mine"], commit_message="From memory")
    assert commit.commit_message == "From memory"
    pushed = hub.hub.repositories["me/memory"].files()
    assert {"config.json", "model.safetensors", "README.md", "shrink.json", "report.html"} <= pushed.keys()
    card = ModelCard(pushed["README.md"].decode())
    assert {"hf_shrink", "8-bit", "mine"} <= set(card.data.tags)
    assert "me/memory" in card.text


def test_a_loaded_model_pushes_the_card_that_it_came_with(hub: Server, folder: Path, tmp_path: Path) -> None:
    (folder / "README.md").write_text((folder / "README.md").read_text() + "\nA word of mine.\n")
    model = AutoModelForCausalLM.from_pretrained(folder)
    hf_shrink.push_shrunk_to_hub(model, "loaded", tokenizer=tiny_tokenizer(), private=True)
    pushed = hub.hub.repositories["me/loaded"].files()
    assert b"A word of mine." in pushed["README.md"]
    assert "tokenizer.json" in pushed
    (tmp_path / "weights.safetensors").write_bytes(pushed["model.safetensors"])
    there, here = load_file(tmp_path / "weights.safetensors"), load_file(folder / "model.safetensors")
    assert there.keys() == here.keys()
    assert all(torch.equal(there[name], here[name]) for name in here)


def test_save_pretrained_pushes_too(hub: Server, folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "again", push_to_hub=True, commit_message="hello", private=True)
    assert hub.hub.repositories["me/again"].branches["main"][-1].message == "hello"
    assert (tmp_path / "again" / "model.safetensors").is_file()
