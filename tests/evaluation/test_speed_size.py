"""Speed, sizes and completions: what is counted, not how fast this machine is."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from tiny import VOCABULARY, tiny_llama, tiny_tokenizer
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    ViTConfig,
    ViTForImageClassification,
)

from hf_shrink.errors import ArchitectureError, CheckpointError
from hf_shrink.evaluation import (
    compare_decode_speed,
    decode_speed,
    forward_latency,
    greedy_completion,
    stored_bytes,
    unique_bytes,
)

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}


def counted(model):
    """The lengths of what goes into each forward pass."""
    lengths = []
    model.register_forward_pre_hook(
        lambda m, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return lengths


def test_decoding_makes_exactly_the_tokens_it_times(monkeypatch):
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[2] = 0  # make the end of text likely nowhere in particular
    lengths = counted(model)
    ticks = iter([0.0, 9.0, 0.0, 1.0, 0.0, 4.0, 0.0, 2.0])  # warm-up, then three runs of which 2 s is the median
    monkeypatch.setattr("hf_shrink.evaluation.speed.time.perf_counter", lambda: next(ticks))
    assert decode_speed(model, prompt=5, new=6, repeats=3) == 3.0
    assert lengths == [5, 1, 1, 1, 1, 1] * 4


def test_prompt_and_new_tokens_fit_the_positions():
    model = tiny_llama(max_position_embeddings=16)
    lengths = counted(model)
    decode_speed(model, prompt=64, new=64, repeats=1)
    assert lengths == [8, *[1] * 7] * 2


def test_comparison_alternates(monkeypatch):
    dense, small = tiny_llama(), tiny_llama(1)
    order = []
    for name, model in (("dense", dense), ("small", small)):
        model.register_forward_hook(lambda *_, name=name: order.append(name))
    result = compare_decode_speed(dense, small, prompt=3, new=1, repeats=2)
    assert order == ["dense", "small"] * 3
    assert result["unit"] == "tokens/s"
    assert result["speedup"] == pytest.approx(result["compressed"] / result["dense"])


def test_the_models_own_sampling_settings_do_not_matter():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    before = greedy_completion(model, tokenizer, "The", new=6)
    model.generation_config.update(do_sample=True, temperature=5.0, num_beams=3, max_length=4, eos_token_id=[2, 3])
    assert greedy_completion(model, tokenizer, "The", new=6) == before
    lengths = counted(model)
    decode_speed(model, prompt=5, new=6, repeats=1)
    assert lengths == [5, 1, 1, 1, 1, 1] * 2
    assert model.generation_config.temperature == 5.0


def test_two_towers_read_both():
    text = CLIPTextConfig(vocab_size=VOCABULARY, **SMALL)
    vision = CLIPVisionConfig(image_size=16, patch_size=8, **SMALL)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict())).eval()
    seen = []
    model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    assert forward_latency(model, repeats=1) > 0
    assert seen == [{"input_ids", "attention_mask", "pixel_values"}] * 2


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_models_that_do_not_generate_run_forward(family):
    if family == "bert":
        model = BertModel(BertConfig(vocab_size=VOCABULARY, **SMALL)).eval()
    else:
        model = ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, **SMALL)).eval()
    assert forward_latency(model, repeats=1) > 0
    assert compare_decode_speed(model, model, repeats=1)["unit"] == "passes/s"
    with pytest.raises(ArchitectureError, match="forward_latency"):
        decode_speed(model)


def test_tied_weights_count_once(tmp_path):
    tied, untied = tiny_llama(tie_word_embeddings=True), tiny_llama(tie_word_embeddings=False)
    assert unique_bytes(untied) - unique_bytes(tied) == VOCABULARY * 48 * 4
    everything = [*untied.parameters(), *untied.buffers()]
    assert unique_bytes(untied) == sum(t.numel() * t.element_size() for t in everything)
    tied.save_pretrained(tmp_path)
    loaded = type(tied).from_pretrained(tmp_path)
    assert unique_bytes(loaded) == unique_bytes(tied)


def test_views_of_one_storage_count_once():
    module, whole = torch.nn.Module(), torch.zeros(10, 4)
    module.register_buffer("first", whole[:5])
    module.register_buffer("second", whole[5:])
    assert unique_bytes(module) == 160
    assert unique_bytes(torch.nn.Linear(4, 3, device="meta")) == 60


def test_stored_bytes_are_those_of_the_safetensors(tmp_path):
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        stored_bytes(tmp_path)
    for name in ("a", "b"):
        save_file({"x": torch.zeros(100)}, tmp_path / f"{name}.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert stored_bytes(tmp_path) == sum(p.stat().st_size for p in tmp_path.glob("*.safetensors")) > 800


def test_completion_is_the_greedy_continuation():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    text = greedy_completion(model, tokenizer, "The tide goes", new=5)
    ids = tokenizer("The tide goes", return_tensors="pt").input_ids
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(5):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert text == tokenizer.decode(ids[0, start:], skip_special_tokens=True) != ""
    with pytest.raises(ArchitectureError, match="does not generate"):
        greedy_completion(BertModel(BertConfig(vocab_size=VOCABULARY, **SMALL)), tokenizer, "x")
