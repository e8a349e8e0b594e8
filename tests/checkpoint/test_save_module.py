"""Modules that transformers did not make: packed or not, they come back the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoint.rows import W4_ASYMMETRIC, W8, channel
from safetensors.torch import load_file, save_file
from torch import nn

from hf_shrink.checkpoint.module import load_module, save_module
from hf_shrink.errors import CheckpointError
from hf_shrink.ops.grid import min_max_grid, quantize
from hf_shrink.plan import Scheme
from hf_shrink.quantization.base import QuantizedWeight
from hf_shrink.runtime import CompressedEmbedding, CompressedLinear, PackedModule


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(40, 48)
        self.body = nn.Sequential(nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 48))
        self.head = nn.Linear(48, 40, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.words(ids)))


IDS = torch.arange(12).view(2, 6)


def packed(schemes: dict[str, Scheme]) -> Net:
    torch.manual_seed(0)
    net = Net().eval()
    for path, scheme in schemes.items():
        module = net.get_submodule(path)
        grid = min_max_grid(module.weight.detach(), scheme, torch.float32)
        solved = QuantizedWeight(quantize(module.weight.detach(), grid), grid, 0.0)
        if isinstance(module, nn.Embedding):
            net.set_submodule(path, CompressedEmbedding.from_quantized(solved, module.padding_idx))
        else:
            net.set_submodule(path, CompressedLinear.from_quantized(solved, module.bias))
    return net


CASES = {
    "dense": {},
    "linears": {"body.0": W8, "body.2": W4_ASYMMETRIC},
    "embedding": {"words": channel(4), "head": channel(3)},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("into", ["class", "function", "module"])
def test_round_trip(case: str, into: str, tmp_path: Path) -> None:
    net, given = packed(CASES[case]), {"class": Net, "function": lambda: Net(), "module": Net()}[into]
    save_module(net, tmp_path / "out")
    again = load_module(given, tmp_path / "out").eval()
    assert torch.equal(again(IDS), net(IDS))
    assert {n for n, m in again.named_modules() if isinstance(m, PackedModule)} == set(CASES[case])
    assert (again is given) == (into == "module")
    assert torch.equal(load_module(again, tmp_path / "out")(IDS), net(IDS))


def test_the_files(tmp_path: Path) -> None:
    save_module(packed(CASES["linears"]), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "shrink.json"}
    data = json.loads((tmp_path / "shrink.json").read_text())
    assert Scheme(**data["schemes"]["body.0"]) == Scheme(8, True, "group", 16)
    assert "body.0.weight_packed" in load_file(tmp_path / "model.safetensors")


def test_another_module_is_refused(tmp_path: Path) -> None:
    save_module(packed(CASES["linears"]), tmp_path)
    with pytest.raises(CheckpointError, match="another module"):
        load_module(nn.Linear(3, 3), tmp_path)
    save_module(packed({}), tmp_path)
    with pytest.raises(CheckpointError, match="another module"):
        load_module(nn.Linear(3, 3), tmp_path)


def test_damage_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        load_module(Net, tmp_path)
    save_module(packed(CASES["linears"]), tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    del weights["body.0.weight_scale"]
    save_file(weights, path)
    with pytest.raises(CheckpointError, match=r"body\.0\.weight_scale"):
        load_module(Net, tmp_path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="by its header"):
        load_module(Net, tmp_path)
    (tmp_path / "shrink.json").write_text('{"schemes": {"body.0": {"bits": 99}}}')
    save_file(weights, path)
    with pytest.raises(CheckpointError, match="schemes"):
        load_module(Net, tmp_path)
