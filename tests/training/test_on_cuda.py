"""On a GPU: a Trainer with the callback, distillation, and recovery.

    python -m pytest tests/training/test_on_cuda.py -n 0

Without a GPU all of it is skipped, and stays unmeasured.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_llama
from torch import Tensor
from training.trained import language, outputs, quantize, trainer, width
from transformers import TrainerCallback, TrainingArguments

import hf_shrink
from hf_shrink import DistillationTrainer, ShrinkCallback, recover, shrink
from hf_shrink.runtime.linear import CompressedLinear

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here: unmeasured")

SETTINGS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"bf16": True},
    "float16": {"fp16": True},
    "checkpointing": {"activation_checkpointing": True},
    "compiled": {"torch_compile": True},
    "accumulation and clipping": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5},
}
THERE = {"use_cpu": False, "max_steps": 16}


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(ids.to(model.device)).logits.float().cpu()
    return found


def divergence(model: Any, dense: Any, ids: Tensor) -> float:
    """KL(dense || model) in nats a token."""
    p, q = (logits(m, ids).double().log_softmax(-1) for m in (dense, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


def parameters(model: Any) -> int:
    return sum(p.numel() for p in model.model.layers.parameters())


@pytest.mark.parametrize("name", SETTINGS)
def test_gradual_pruning(name: str, tmp_path: Path) -> None:
    model = tiny_llama(num_hidden_layers=2)
    before = parameters(model)
    run = trainer(model, language, tmp_path, [ShrinkCallback(width(0.3))], **THERE, **SETTINGS[name])
    run.train()
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    assert 1 - parameters(model) / before == pytest.approx(0.3, abs=0.05)
    run.save_model()
    loaded = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(value, model.state_dict()[key].cpu()) for key, value in loaded.state_dict().items())


class Before(TrainerCallback):
    """Keeps what the model says when training ends, before anything is packed."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.said = logits(kwargs["model"], torch.arange(3, 27).view(2, 12))


@pytest.mark.parametrize("scheme", ["W4A16", "W8A8"])
@pytest.mark.parametrize("name", SETTINGS)
def test_quantization_aware_training(name: str, scheme: str, tmp_path: Path) -> None:
    model, before = tiny_llama(num_hidden_layers=2), Before()
    callbacks = [before, ShrinkCallback(quantize(scheme), start=0.25)]
    run = trainer(model, language, tmp_path, callbacks, **THERE, **SETTINGS[name])
    dense = run.evaluate()["eval_loss"]
    run.train()
    assert isinstance(model.model.layers[1].mlp.down_proj, CompressedLinear)
    assert run.evaluate()["eval_loss"] < 0.9 * dense
    run.save_model()
    loaded = type(model).from_pretrained(tmp_path, quantization_config=hf_shrink.LoadingConfig(optimize=False))
    found = logits(loaded, torch.arange(3, 27).view(2, 12))
    exact = scheme == "W4A16" and name not in ("bfloat16", "float16")  # else rounded once more, by autocast or inputs
    if exact:
        torch.testing.assert_close(found, before.said, rtol=0, atol=1e-3)
    assert (found - before.said).abs().mean() < 0.05 < before.said.std()


def test_distillation(tmp_path: Path) -> None:
    teacher = tiny_llama(num_hidden_layers=2)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for p in student.model.layers.parameters():
            p.add_(0.3 * p.std() * torch.randn_like(p))
    ids = torch.randint(5, 40, (8, 10))
    far = divergence(student, teacher, ids)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=40, per_device_train_batch_size=8, learning_rate=3e-3, report_to=[], save_strategy="no"
    )
    rows = [{"input_ids": row, "labels": row} for row in ids]
    parts = {"logits": 1.0, "hidden": 0.1, "task": 0.0}
    run = DistillationTrainer(student, arguments, train_dataset=rows, teacher=teacher, distillation=parts)
    run.train()
    assert student.device.type == "cuda"
    assert divergence(student, teacher, ids) < 0.7 * far


@pytest.mark.parametrize("method", ["lora", "full", "scales"])
def test_recovery(method: str) -> None:
    dense = tiny_llama(3, hidden_size=64, intermediate_size=128, num_hidden_layers=3, head_dim=16,
                       num_attention_heads=4, num_key_value_heads=2).cuda()  # fmt: skip
    data = [{"input_ids": torch.randint(3, 20, (4, 16))} for _ in range(36)]
    bits = {"method": "rtn", "scheme": "W2A16", "group_size": 32}
    step = (
        {"quantize": bits} if method == "scales" else {"prune": {"what": "width", "method": "magnitude", "ratio": 0.3}}
    )
    model = shrink(copy.deepcopy(dense), {"steps": [step]}, calibration=data, progress=False)
    ids = torch.randint(3, 20, (8, 16))
    far = divergence(model, dense, ids)
    found = recover(model, teacher=dense, data=data, method=method, steps=30, tokens=64, learning_rate=0.005,
                    progress=False, **({"rank": 4} if method == "lora" else {}))  # fmt: skip
    assert found.adopted and model.device.type == "cuda"
    assert divergence(model, dense, ids) < far


def test_evaluations_on_the_way(tmp_path: Path) -> None:
    model = tiny_llama(num_hidden_layers=2)
    run = trainer(model, language, tmp_path, [ShrinkCallback(width(0.3))], **THERE, eval_strategy="steps", eval_steps=5)
    run.train()
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert len(losses) >= 3 and all(map(math.isfinite, losses))
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    assert outputs(copy.deepcopy(model).cpu(), language)["logits"].isfinite().all()
