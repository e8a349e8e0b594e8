"""`optimize_for_inference` on whole models: the same words, the same checkpoint, and training afterwards."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_shrink import (
    CheckpointError,
    LoadingConfig,
    kernel_summary,
    known_to_peft,
    load_adapter,
    optimize_for_inference,
    shrink,
)

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
    return shrink(tiny(), RECIPE, progress=False, optimize=False)


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
    assert not kernel_summary(packed).get("int4")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "fast")
    assert len(kernel_summary(again)["int4"]) == 14
    with torch.no_grad():
        assert torch.equal(again(ids).logits, fast(ids).logits)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "fast", quantization_config=LoadingConfig(optimize=False))
    assert list(kernel_summary(plain)) == ["not optimized"]
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, packed(ids).logits)
    assert torch.equal(again(ids).logits, packed(ids).logits) or kernel_summary(again).get("int4")
    assert optimize_for_inference(fast) is fast


def test_it_generates(packed):
    fast = optimize_for_inference(copy.deepcopy(packed).bfloat16())
    ids = torch.randint(96, (2, 7))
    words = fast.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    assert words.shape == (2, 12)


def stock_checkpoint(packed: LlamaForCausalLM, folder: Path) -> Path:
    """What another tool would have written: without our marks."""
    packed.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["hf_shrink"], config["hf_shrink"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_checkpoints_of_others_only_when_asked(packed, tmp_path):
    folder = stock_checkpoint(packed, tmp_path / "other")
    ids = torch.randint(96, (1, 150))
    stock = AutoModelForCausalLM.from_pretrained(folder)
    assert not kernel_summary(stock)
    fast = optimize_for_inference(AutoModelForCausalLM.from_pretrained(folder))
    assert len(kernel_summary(fast)["int4"]) == 14
    with torch.no_grad():
        torch.testing.assert_close(fast(ids).logits, stock(ids).logits, rtol=1e-4, atol=1e-5)
    assert len(kernel_summary(fast)["int4"]) == 14  # nothing was made dense
    fast.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(load_file(tmp_path / "again" / "model.safetensors")[name], tensor), name
    with pytest.raises(CheckpointError, match="dense already"):
        optimize_for_inference(stock)


@pytest.mark.parametrize("training", [False, True])
def test_lora_on_top_of_a_loaded_checkpoint(packed, training, tmp_path):
    packed.save_pretrained(tmp_path)
    fast = AutoModelForCausalLM.from_pretrained(tmp_path)
    config = LoraConfig(target_modules=["q_proj", "down_proj"], r=4, init_lora_weights=False)
    tuned = get_peft_model(fast, known_to_peft(config)).train(training)
    ids = torch.randint(96, (2, 12))
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for _ in range(3):
        loss = tuned(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.abs().sum() > 0 for p in tuned.parameters() if p.requires_grad)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert len(kernel_summary(tuned)["int4"]) == 14
    tuned.save_pretrained(tmp_path / "adapter")
    again = load_adapter(AutoModelForCausalLM.from_pretrained(tmp_path), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, tuned.eval()(ids).logits)


def test_a_first_part_of_the_model_learns_through_it(packed):
    exact, fast = copy.deepcopy(packed), optimize_for_inference(copy.deepcopy(packed))
    ids = torch.randint(96, (2, 90))
    gradients = []
    for model in (exact, fast):
        model(ids, labels=ids).loss.backward()
        gradients.append(model.get_input_embeddings().weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"quantization_config": LoadingConfig(optimize=False)}])
def test_loaded_models_can_be_cast(packed, options, tmp_path):
    packed.save_pretrained(tmp_path)
    ids = torch.randint(96, (2, 100))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    for name, dtype in (("half", torch.float16), ("float", torch.float32), ("bfloat16", torch.bfloat16)):
        model, other = copy.deepcopy(loaded).bfloat16(), copy.deepcopy(loaded).bfloat16()
        with torch.no_grad():
            assert torch.equal(getattr(model, name)()(ids).logits, other.to(dtype)(ids).logits)
        assert model.dtype == dtype and loaded.dtype == torch.float32
        assert model.model.layers[0].mlp.up_proj.weight_scale.dtype == dtype


def test_models_of_other_tools_can_be_cast_once_they_are_optimized(packed, tmp_path):
    fast = optimize_for_inference(AutoModelForCausalLM.from_pretrained(stock_checkpoint(packed, tmp_path)))
    assert fast.half() is fast and fast.dtype == torch.float16
