"""`optimize_for_inference` on whole models: the same words, the same checkpoint, and training afterwards."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_shrink import kernel_summary, optimize_for_inference, shrink

RECIPE = {"steps": [{"quantize": {"method": "rtn", "scheme": "W4A16", "group_size": 32}}]}


def tiny(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


@pytest.fixture(scope="module")
def packed() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return shrink(tiny(), RECIPE, progress=False)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_same_checkpoint_and_near_logits(packed, tmp_path):
    fast = optimize_for_inference(copy.deepcopy(packed))
    assert {kind: len(paths) for kind, paths in kernel_summary(fast).items()} == {"int4": 14}
    ids = torch.randint(96, (2, 100))
    with torch.no_grad():
        torch.testing.assert_close(fast(ids).logits, packed(ids).logits, rtol=1e-4, atol=1e-5)
        few, exact = fast(ids[:, :9]).logits, packed(ids[:, :9]).logits
    assert F.kl_div(few.log_softmax(-1), exact.log_softmax(-1), log_target=True, reduction="batchmean") < 1e-4
    packed.save_pretrained(tmp_path / "plain")
    fast.save_pretrained(tmp_path / "fast")
    assert files(tmp_path / "plain") == files(tmp_path / "fast")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "fast")
    assert torch.equal(again(ids).logits, packed(ids).logits) or kernel_summary(again).get("int4")
    assert optimize_for_inference(fast) is fast


def test_it_generates(packed):
    fast = optimize_for_inference(copy.deepcopy(packed).bfloat16())
    ids = torch.randint(96, (2, 7))
    words = fast.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    assert words.shape == (2, 12)
