"""Vision-language checkpoints in a process that never imports hf_shrink: the same outputs, with images and without."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.cases import CASES
from image_batches import batches_for, text_batch
from safetensors import safe_open
from stock import Stock
from torch import Tensor

from hf_shrink import shrink

SCHEME = {"method": "rtn", "scheme": "W8A16", "group_size": 8}
TOWERS = "re:.*(?:vision_tower|multi_modal_projector|visual).*"
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "llava": ("llava", {}),
    "llava, tied": ("llava_tied", {}),
    "llava, head apart": ("llava_tied", {"overrides": {"lm_head": {}}}),
    "llava, all of it": ("llava", {"overrides": {TOWERS: {"scheme": "W4A16"}, "lm_head": {}}}),
    "llava, only the tower": ("llava", {"targets": ["re:.*vision_tower.*"]}),
    "llava, asymmetric": ("llava", {"symmetric": False, "group_size": 4}),
    "qwen2_vl": ("qwen2_vl", {}),
    "qwen2_vl, tied": ("qwen2_vl_tied", {}),
    "qwen2_vl, all of it": ("qwen2_vl", {"method": "gptq", "overrides": {TOWERS: {"scheme": "W4A16"}, "lm_head": {}}}),
    "qwen2_vl, asymmetric": ("qwen2_vl", {"symmetric": False}),
    "qwen2_5_vl": ("qwen2_5_vl", {"overrides": {TOWERS: {"scheme": "W4A16"}}}),
    "gemma3": ("gemma3", {}),
}
Results = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Outcome:
    """A row's checkpoint, and the logits and generated tokens of the model that wrote it and of stock's."""

    folder: Path
    own: Results
    error: str
    stock: Results


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, stock_process: Stock) -> dict[str, Outcome]:
    root = tmp_path_factory.mktemp("vision_language")
    jobs, own = [], {}
    for index, (name, (case, quantize)) in enumerate(ROWS.items()):
        # One without an image, and one with images, padding and another length.
        batches = [text_batch(), text_batch(7, rows=2)] if case == "gemma3" else batches_for(case)[1::2]
        recipe = {"steps": [{"quantize": {**SCHEME, **quantize}}]}
        model: Any = shrink(CASES[case].build(), recipe, calibration=batches, progress=False)
        assert model.shrink_report.portable
        folder = root / str(index)
        model.save_pretrained(folder)
        settings = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4}
        with torch.no_grad():
            own[name] = folder, [(model(**batch).logits, model.generate(**batch, **settings)) for batch in batches]
        torch.save(batches, folder / "inputs.pt")
        jobs.append({"folder": str(folder), "class": type(model).__name__, "inputs": str(folder / "inputs.pt")})
    stock_process.run(jobs)
    found = {}
    for name, (folder, results) in own.items():
        error, stock = folder / "stock.txt", folder / "stock.pt"
        text = error.read_text() if error.is_file() else ""
        found[name] = Outcome(folder, results, text, torch.load(stock) if stock.is_file() else [])
    return found


@pytest.mark.parametrize("name", ROWS)
def test_stock_computes_the_same(name: str, outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes[name]
    assert not outcome.error
    assert len(outcome.stock) == len(outcome.own) > 1
    for (own, written), (stock, stock_written) in zip(outcome.own, outcome.stock, strict=True):
        assert (stock - own).abs().max() <= 1e-5 * own.abs().max()
        assert torch.equal(stock_written, written)


@pytest.mark.parametrize("name", ROWS)
def test_targets_name_the_packed_weights_of_the_files_and_no_others(name: str, outcomes: dict[str, Outcome]) -> None:
    """For loaders that go by the names in the files, which are not those of transformers' modules here."""
    folder = outcomes[name].folder
    with safe_open(folder / "model.safetensors", "pt") as file:
        stored = list(file.keys())
    block = json.loads((folder / "config.json").read_text())["quantization_config"]
    packed = {key.removesuffix(".weight_packed") for key in stored if key.endswith(".weight_packed")}
    dense = {key.removesuffix(".weight") for key in stored if key.endswith(".weight")}
    assert packed
    for path in packed | dense:
        groups = [
            group
            for group, scheme in block["config_groups"].items()
            if any(re.match(target.removeprefix("re:"), path) for target in scheme["targets"])
        ]
        assert len(groups) == (path in packed), path
