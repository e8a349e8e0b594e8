"""Compression of a model on a GPU that is not there (see `elsewhere.py`): nothing is mixed with the CPU's tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from elsewhere import DEVICE, Elsewhere, pretending
from tiny import QUICK_GPTQ, tiny_llama

from hf_shrink import shrink
from hf_shrink.evaluation import evaluate_model

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
