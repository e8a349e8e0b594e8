"""Compression of a model on a GPU that is not there (see `elsewhere.py`): nothing is mixed with the CPU's tensors."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from elsewhere import DEVICE, Elsewhere, pretending
from tiny import QUICK_GPTQ, tiny_llama, tiny_tokenizer

from hf_shrink import shrink, shrink_checkpoint
from hf_shrink.checkpoint import device as devices
from hf_shrink.checkpoint.source import open_source
from hf_shrink.checkpoint.streamed import load_streamed
from hf_shrink.errors import ArchitectureError, RecipeError
from hf_shrink.evaluation import evaluate_model
from hf_shrink.pipeline import checkpointing, measuring
from hf_shrink.residence import Residence

SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
QUICK = {**QUICK_GPTQ, "scheme": "W8A16", "group_size": 16}
RECIPES: dict[str, list[dict[str, Any]]] = {
    "gptq, with a head": [{"quantize": {**QUICK, "rescale": True, "refinements": 1, "head": "W8A16"}}],
    "tuned": [{"quantize": {**QUICK, "tune": {"steps": 2, "rounding": True}}}],
    "learned": [{"quantize": {"method": "learned", "scheme": "W8A16", "steps": 2}}],
    "scaled": [{"quantize": {"method": "rtn", "search": False, "scheme": "W8A16", "transforms": ["smooth"]}}],
    "rotated": [{"quantize": {"method": "rtn", "search": False, "scheme": "W8A16", "transforms": ["rotate"]}}],
    "width": [{"prune": {"what": "width", "method": "obs", "ratio": 0.2}}, {"quantize": {"scheme": "W8A8"}}],
    "width by gradients": [{"prune": {"what": "width", "method": "taylor", "ratio": 0.2}}],
    "depth": [{"prune": {"what": "depth", "method": "evolve", "blocks": 1, "generations": 2}}],
    "hidden": [{"prune": {"what": "hidden", "method": "pca", "ratio": 0.2}}],
    "weights": [{"prune": {"what": "weights", "method": "sparsegpt", "pattern": "2:4", "refit": False}}],
}


def batches() -> list[dict[str, torch.Tensor]]:
    """Of unequal lengths, one of them padded."""
    torch.manual_seed(1)
    made = [{"input_ids": torch.randint(3, 320, (2, length))} for length in (16, 16, 12)]
    made[1]["attention_mask"] = torch.ones(2, 16, dtype=torch.long)
    made[1]["attention_mask"][0, :5] = 0
    return made


def test_the_pretence_refuses_company() -> None:
    with pretending() as device:
        there = torch.randn(3, 4).to(device)
        assert isinstance(there @ there.T, Elsewhere) and there.device == DEVICE and not there.cpu().is_cuda
        assert isinstance(torch.zeros(3, device=there.device), Elsewhere)
        there += 1.0
        there[torch.tensor([0, 1])] = 2.0  # an index may lie on the CPU
        for mistake in (
            lambda: there + torch.ones(3, 4),
            lambda: there.index_select(0, torch.tensor([0])),
            lambda: torch.ones(3)[there[:, 0].long()],
            lambda: torch.where(there > 0, torch.ones(3, 4), there),
        ):
            with pytest.raises(AssertionError, match="CPU"):
                mistake()


OFTEN = ("gptq, with a head", "tuned", "depth", "hidden")


@pytest.mark.parametrize(
    "name", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES]
)
def test_compression_stays_on_the_device(name: str) -> None:
    recipe = {"portable": False, "steps": RECIPES[name]}
    reference = shrink(tiny_llama(num_hidden_layers=2, **SIZES), recipe, calibration=batches(), progress=False)
    wanted = evaluate_model(reference, batches(), metrics=("perplexity",))["model"]["perplexity"]["value"]
    with pretending() as device:
        model = tiny_llama(num_hidden_layers=2, **SIZES).to(device)
        shrink(model, recipe, calibration=batches(), progress=False)
        found = evaluate_model(model, batches(), metrics=("perplexity",))["model"]["perplexity"]["value"]
    assert all(tensor.device == DEVICE for tensor in (*model.parameters(), *model.buffers()))
    assert found == pytest.approx(wanted, rel=0.05)


class Killed(BaseException):
    """Nothing catches it."""


EVALUATED = {"metrics": ["perplexity", "kl_divergence"], "samples": 2, "length": 16}
SEVERAL: dict[str, list[dict[str, Any]]] = {
    **{name: RECIPES[name] for name in ("gptq, with a head", "learned", "scaled", "rotated", "width", "weights")},
    **{name: RECIPES[name] for name in ("width by gradients", "depth", "hidden")},
    "depth and span": [{"prune": {"what": "depth", "method": "span", "blocks": 1}}, {"quantize": QUICK}],
}


@pytest.fixture
def runs(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run `shrink_checkpoint` on the device that is not there; `visited`: the model does not fit it whole."""
    source, text = tmp_path / "source", tmp_path / "text.txt"
    dtype = getattr(request, "param", torch.float32)
    tiny_llama(num_hidden_layers=3, **SIZES).to(dtype).save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    text.write_text("one word after another, and then some more of them. " * 20)
    monkeypatch.setattr(checkpointing, "write_report", lambda *given, **named: None)
    monkeypatch.setattr(measuring, "compare_decode_speed", lambda *given, **named: None)
    monkeypatch.setattr(checkpointing, "chosen_device", lambda name: DEVICE)
    monkeypatch.setattr(Residence, "needed_to_visit", lambda self: 0)
    # Loaded beforehand: while pretending, transformers leaves the buffers as they are that no checkpoint has.
    loaded = [load_streamed(open_source(source), tmp_path / f"scratch-{i}", 0) for i in range(6)]
    monkeypatch.setattr(checkpointing, "load_streamed", lambda *given, **named: loaded.pop())

    def run(folder: str, steps: list[dict[str, Any]], *, visited: bool = False) -> Any:
        recipe: dict[str, Any] = {"portable": False, "evaluation": {**EVALUATED, "data": str(text)}}
        recipe |= {"steps": steps} if steps else {"budget": {"bytes": "60%"}}
        monkeypatch.setattr(devices, "free_on", lambda device: 0 if visited else 10**12)
        return shrink_checkpoint(source, tmp_path / folder, recipe, calibration=batches(), progress=False)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("visited", [pytest.param(False, id="whole"), True])
def test_a_checkpoint_is_shrunk_on_the_device_killed_and_taken_up_again(
    runs: Any, visited: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    steps, finish = [{"quantize": QUICK}], Residence.finish

    def once(self: Residence, name: str, block: Any, *rest: Any) -> None:
        seen.extend(tensor.device.type for tensor in (*block.parameters(), *block.buffers()))
        finish(self, name, block, *rest)
        if name.endswith(".1") and not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            raise Killed

    with pretending():
        report = runs("whole", steps)
        monkeypatch.setattr(Residence, "finish", once)
        with pytest.raises(Killed):
            runs("again", steps, visited=visited)
        again = runs("again", steps, visited=visited)
    assert set(seen) == {"cuda"} and report.machine["device"] == again.machine["device"] == "cuda:0"
    assert any("one block at a time" in note for note in again.notes) == visited
    one, other = (made.evaluation["compressed"]["kl_divergence"]["value"] for made in (report, again))
    assert one == other < 0.5
    one, other = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in ("whole", "again"))
    assert one == other


# The stand-in does not bear a half-precision backward pass that runs blocks again, whole or not.
HALF = [name for name in SEVERAL if name != "width by gradients"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("runs", "name"),
    [*((torch.float32, name) for name in SEVERAL), *((torch.bfloat16, name) for name in HALF)],
    indirect=["runs"],
    ids=str,
)
def test_blocks_that_come_one_at_a_time_change_nothing(name: str, runs: Any, tmp_path: Path) -> None:
    with pretending():
        whole, visited = runs("whole", SEVERAL[name]), runs("visited", SEVERAL[name], visited=True)
    for report in (whole, visited):
        del report.evaluation["seconds"]
    assert whole.evaluation == visited.evaluation
    one, other = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in ("whole", "visited"))
    assert one == other


def test_what_changes_the_whole_model_at_once_needs_all_of_it_there(runs: Any, tmp_path: Path) -> None:
    tuned = [{"quantize": {**QUICK, "tune": {"steps": 2}}}]
    for steps, message in ((tuned, "leave tune out"), ([], "take --device cpu")):
        with pretending(), pytest.raises(RecipeError, match=message):
            runs(message, steps, visited=True)


def test_where_a_model_is_worked_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(devices.torch.accelerator, "current_accelerator", lambda check_available=False: None)
    assert devices.chosen_device(None) == devices.chosen_device("cpu") == cpu
    with pytest.raises(ArchitectureError, match="no device 'cuda' here; there is: cpu"):
        devices.chosen_device("cuda")
    monkeypatch.setattr(devices.torch.accelerator, "current_accelerator", lambda check_available=False: DEVICE)
    monkeypatch.setattr(devices.torch.accelerator, "device_count", lambda: 1)
    assert devices.chosen_device(None) == devices.chosen_device("cuda:0") == DEVICE
    for name in ("cuda:1", "nonsense", "mps"):
        with pytest.raises(ArchitectureError, match=f"no device '{name}' here; there is: cuda, cpu"):
            devices.chosen_device(name)
    monkeypatch.setattr(devices, "ranks", lambda: SimpleNamespace(device=torch.device("cuda", 3)))
    assert [devices.chosen_device(name).index for name in (None, "cuda", "cuda:0", "cpu")] == [3, 3, 0, None]
    tiny_llama().save_pretrained(tmp_path / "source")
    model = load_streamed(open_source(tmp_path / "source"), tmp_path / "scratch", 10**9)
    monkeypatch.setattr(devices.torch.cuda, "mem_get_info", lambda device: (1000, 1000))
    assert devices.settle(model, cpu, asked=True) is None
    with pytest.raises(ArchitectureError, match=r"does not fit cuda:0: a few blocks .* --device cpu"):
        devices.settle(model, DEVICE, asked=True)
    note = devices.settle(model, DEVICE, asked=False)
    assert note is not None and note.startswith("the CPU did the work") and model.device == cpu
    said: list[str] = []
    with checkpointing.open_checkpoint(tmp_path / "source", 10**9, say=said.append) as (model, _):
        assert model.device == cpu
    assert said == [note.replace("cuda:0", "cuda:3")]
