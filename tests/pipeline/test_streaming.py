"""`shrink_checkpoint` gives the bytes that `shrink` gives, with one block in memory, cut off and resumed or not."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.cases_mixtures import MIXTURES, data
from safetensors.torch import load_file
from tiny import tiny_llama, tiny_tokenizer
from tiny_readers import tiny_bert_mlm
from transformers import BertForMaskedLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from hf_shrink import shrink, shrink_checkpoint
from hf_shrink.checkpoint import journal as journal_module
from hf_shrink.checkpoint import streamed
from hf_shrink.checkpoint.source import load_source_model, open_source
from hf_shrink.errors import CheckpointError
from hf_shrink.pipeline import checkpointing
from hf_shrink.residence import Residence


@pytest.fixture(autouse=True)
def _without_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report page takes longer to draw than a tiny model to shrink, and is tested elsewhere."""
    monkeypatch.setattr(checkpointing, "write_report", lambda *given, **named: None)


Batches = list[dict[str, torch.Tensor]]


def batches(**changes: int) -> Batches:
    draw = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, 300, (2, 24), generator=draw)} for _ in range(6)]


def pairs() -> Batches:
    return [{**batch, "decoder_input_ids": batch["input_ids"][:, :9]} for batch in batches()]


def tiny_t5() -> PreTrainedModel:
    torch.manual_seed(0)
    config = T5Config(vocab_size=320, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4)
    return T5ForConditionalGeneration(config).eval()


def deeper_bert() -> PreTrainedModel:
    config = tiny_bert_mlm().config
    config.num_hidden_layers = 5
    torch.manual_seed(0)
    return BertForMaskedLM(config).eval()


def quantized(**changes: Any) -> dict[str, Any]:
    step = {"scheme": "W4A16", "group_size": 16, **changes}
    return {"steps": [{"quantize": step}], "evaluation": {"metrics": []}}


def pruned(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"portable": False, "steps": [{"prune": step} for step in steps], "evaluation": {"metrics": []}}


W4 = {"quantize": {"scheme": "W4A16", "method": "rtn", "group_size": 8}}
EXPERTS = {"what": "experts", "method": "reap", "experts": 1}
WIDTH = {"what": "width", "method": "obs", "ratio": 0.2}
CASES: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any], Callable[[], Batches]]] = {
    "gptq": (tiny_llama, quantized(method="gptq"), batches),
    "gptq-half": (lambda: tiny_llama().bfloat16(), quantized(method="gptq"), batches),
    "rtn-tied-embedding": (
        lambda: tiny_llama(tie_word_embeddings=True),
        quantized(method="rtn", targets=["Linear", "Embedding"], symmetric=False),
        batches,
    ),
    "learned-awq": (tiny_llama, quantized(method="learned", transforms=["awq"]), batches),
    "rotate": (tiny_llama, quantized(method="rtn", transforms=["rotate"]), batches),
    "width-then-quantize": (
        tiny_llama,
        {**pruned(WIDTH), "steps": [{"prune": WIDTH}, W4]},
        batches,
    ),
    "depth": (tiny_llama, pruned({"what": "depth", "method": "kl_greedy", "blocks": 1}), batches),
    "weights": (tiny_llama, pruned({"what": "weights", "method": "sparsegpt", "sparsity": 0.5}), batches),
    "hidden": (tiny_llama, pruned({"what": "hidden", "method": "pca", "ratio": 0.2}), batches),
    "gptq-tied-head": (
        lambda: tiny_llama(tie_word_embeddings=True),
        {"portable": False, **quantized(method="gptq", targets=["Linear", "Embedding"], ignore=[])},
        batches,
    ),
    "shift": (deeper_bert, quantized(method="gptq", scheme="W8A8", group_size=None, transforms=["shift"]), batches),
    "encoder-decoder": (tiny_t5, quantized(method="gptq"), pairs),
    "mixture-width": (
        MIXTURES["mixtral"],
        {**pruned(WIDTH), "steps": [{"prune": EXPERTS}, {"prune": {**WIDTH, "ratio": 0.1}}, W4]},
        data,
    ),
}


def saved(build: Callable[[], PreTrainedModel], folder: Path) -> Path:
    build().save_pretrained(folder, max_shard_size="40KB")
    tiny_tokenizer().save_pretrained(folder)
    return folder


def contents(folder: Path) -> dict[str, Any]:
    """What a run decides: the files, but for the times in the record and what is made from it."""
    record = json.loads((folder / "shrink.json").read_text()) if (folder / "shrink.json").is_file() else {}
    report = {k: v for k, v in record.get("report", {}).items() if k not in ("seconds", "evaluation")}
    report["notes"] = [re.sub(r" in \d+ s$", "", note) for note in report.get("notes", ())]
    files = {f.name: f.read_bytes() for f in folder.iterdir() if f.suffix == ".safetensors" or f.name == "config.json"}
    return {**files, "plan": record.get("plan"), "report": report}


QUICK = ("gptq", "width-then-quantize", "encoder-decoder")


def some_slow(quick: tuple[str, ...], names: Iterable[str] = CASES) -> list[Any]:
    return [pytest.param(name, marks=[] if name in quick else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", some_slow(QUICK))
def test_the_same_bytes_as_in_memory(name: str, tmp_path: Path) -> None:
    build, recipe, data = CASES[name]
    source = saved(build, tmp_path / "source")
    model = shrink(load_source_model(open_source(source)), recipe, calibration=data(), progress=False)
    model.save_pretrained(tmp_path / "memory")
    expected = contents(tmp_path / "memory")
    found = []
    for place, memory in enumerate((0, "1GB")):
        out = tmp_path / f"out-{place}"
        shrink_checkpoint(source, out, recipe, calibration=data(), max_memory=memory, progress=False)
        found.append(contents(out))
    for key, value in expected.items():
        if key not in ("plan", "report"):
            assert found[0][key] == value, key
            assert found[1][key] == value, key
    assert found[0]["plan"] == found[1]["plan"] == json.loads(model.shrink_record.plan.to_json())
    assert found[0]["report"]["notes"] == found[1]["report"]["notes"]
    assert found[0]["report"]["block_errors"] == model.shrink_report.block_errors


def test_dense_experts_are_taken_apart_a_block_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers joins experts while loading; saving would copy all of them, most of the model, at once."""
    source = saved(MIXTURES["mixtral"], tmp_path / "source")
    blocks: list[set[str]] = []  # of every conversion that made something
    real = streamed.revert_weight_conversion

    def watched(model: Any, tensors: dict[str, torch.Tensor]) -> Any:
        made = real(model, tensors)
        if any(".experts." in name and tensor.device.type != "meta" for name, tensor in made.items()):
            blocks.append({".".join(name.split(".")[:3]) for name in tensors})
        return made

    monkeypatch.setattr(streamed, "revert_weight_conversion", watched)
    recipe = quantized(method="rtn", targets=["re:.*self_attn.*"])
    shrink_checkpoint(source, tmp_path / "out", {**recipe, "portable": False}, max_memory=0, progress=False)
    assert blocks == [{f"model.layers.{i}"} for i in range(MIXTURES["mixtral"]().config.num_hidden_layers)]
    experts = {name for name in load_file(tmp_path / "out" / "model.safetensors") if ".experts." in name}
    assert experts == {name for file in source.glob("*.safetensors") for name in load_file(file) if ".experts." in name}


class Killed(BaseException):
    """Nothing catches it."""


def killing(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Die at the `after`th replacement of a file, before or after it."""
    real, seen = os.replace, [0]

    def replace(source: Any, target: Any) -> None:
        seen[0] += 1
        if seen[0] == after and after % 2:
            raise Killed
        real(source, target)
        if seen[0] == after:
            raise Killed

    monkeypatch.setattr(os, "replace", replace)


@pytest.mark.parametrize(
    "name",
    some_slow(
        ("width-then-quantize",), ["learned-awq", "encoder-decoder", "width-then-quantize", "shift", "mixture-width"]
    ),
)
def test_a_run_that_was_killed_goes_on(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build, recipe, data = CASES[name]
    source, out = saved(build, tmp_path / "source"), tmp_path / "out"
    arguments: dict[str, Any] = {"calibration": data(), "max_memory": 0, "progress": False}
    shrink_checkpoint(source, out, recipe, **arguments)
    expected = contents(out)
    for after in (6, 11, 16):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            killing(patch, after)
            shrink_checkpoint(source, tmp_path / f"again-{after}", recipe, **arguments)
        again = tmp_path / f"again-{after}"
        assert not again.exists()
        shrink_checkpoint(source, again, recipe, **arguments)
        assert contents(again) == expected
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out", "again-6", "again-11", "again-16"}


def test_a_run_that_was_killed_while_it_tidied_up_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = saved(tiny_llama, tmp_path / "source"), tmp_path / "out"
    recipe = quantized(method="rtn")

    def dies(*given: Any, **named: Any) -> None:
        if out.exists():
            raise Killed
        remove(*given, **named)

    remove = shutil.rmtree
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(shutil, "rmtree", dies)
        shrink_checkpoint(source, out, recipe, max_memory=0, progress=False)
    before = contents(out)
    assert len(list(tmp_path.iterdir())) > 2
    with pytest.raises(CheckpointError, match="seed was 0, is 1"):
        shrink_checkpoint(source, out, recipe, seed=1, max_memory=0, progress=False)
    report = shrink_checkpoint(source, out, recipe, max_memory=0, progress=False)
    assert report.bytes_after == json.loads((out / "shrink.json").read_text())["report"]["bytes_after"]
    assert contents(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    with pytest.raises(CheckpointError, match="not empty"):
        shrink_checkpoint(source, out, recipe, max_memory=0, progress=False)


def test_finished_blocks_are_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved(tiny_llama, tmp_path / "source")
    recipe = quantized(method="gptq")
    finished: list[str] = []
    real = Residence.finish

    def finish(self: Residence, name: str, *rest: Any) -> None:
        if len(finished) == 2:
            raise Killed
        real(self, name, *rest)
        finished.append(name)

    monkeypatch.setattr(Residence, "finish", finish)
    with pytest.raises(Killed):
        shrink_checkpoint(source, tmp_path / "out", recipe, calibration=batches(), max_memory=0, progress=False)
    first, finished[:] = [*finished], []
    monkeypatch.setattr(Residence, "finish", lambda *given: (real(*given), finished.append(given[1])))
    shrink_checkpoint(source, tmp_path / "out", recipe, calibration=batches(), max_memory=0, progress=False)
    assert [*first, *finished] == [f"model.layers.{index}" for index in range(4)]


def test_another_run_is_not_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = saved(tiny_llama, tmp_path / "source"), tmp_path / "out"
    arguments: dict[str, Any] = {"max_memory": 0, "progress": False}

    def dies(self: Any, *given: Any, **entries: Any) -> None:
        real(self, *given, **entries)
        if "blocks" in entries:
            raise Killed

    real = journal_module.Journal.add
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(journal_module.Journal, "add", dies)
        shrink_checkpoint(source, out, quantized(method="gptq"), calibration=batches(), **arguments)
    left = sorted(str(path) for path in tmp_path.rglob("*"))
    for recipe, more, message in (
        (quantized(method="gptq", group_size=8), {"calibration": batches()}, "group_size was 16, is 8"),
        (quantized(method="gptq"), {"calibration": batches(), "seed": 1}, "seed was 0, is 1"),
        (quantized(method="gptq"), {"calibration": batches()[1:]}, "calibration data is not that"),
    ):
        with pytest.raises(CheckpointError, match=message):
            shrink_checkpoint(source, out, recipe, **more, **arguments)
    tiny_llama(seed=1).save_pretrained(source, max_shard_size="40KB")
    with pytest.raises(CheckpointError, match="safetensors was"):
        shrink_checkpoint(source, out, quantized(method="gptq"), calibration=batches(), **arguments)
    assert sorted(str(path) for path in tmp_path.rglob("*") if "source" not in path.parts) == left or left
    report = shrink_checkpoint(source, out, quantized(method="gptq"), calibration=batches(), resume=False, **arguments)
    assert report.block_errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
