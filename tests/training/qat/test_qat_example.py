"""scripts/train_causal_lm.py, from text files to a packed model."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from from_scripts import load_script
from tiny import TEXT, tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM

from hf_shrink.runtime.linear import CompressedLinear


def test_it_trains_and_saves_a_packed_model(tmp_path: Path) -> None:
    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    for name in ("train", "validation"):
        (tmp_path / f"{name}.txt").write_text(TEXT)
    settings = {
        "model_name_or_path": tmp_path / "dense",
        "train_file": tmp_path / "train.txt",
        "validation_file": tmp_path / "validation.txt",
        "output_dir": tmp_path / "out",
        "block_size": 16,
        "max_steps": 8,
        "learning_rate": 0.01,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "portable": True,
    }
    found = load_script("train_causal_lm.py").main([str(word) for k, v in settings.items() for word in (f"--{k}", v)])
    assert found["eval_perplexity"] == pytest.approx(math.exp(found["eval_loss"]), rel=1e-3)
    assert found["eval_perplexity"] < 100  # of 320 tokens, and the untrained model is far above
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(packed.model.layers[0].mlp.down_proj, CompressedLinear)
    assert packed.shrink_record.recipe["portable"] and packed.shrink_report.portable
