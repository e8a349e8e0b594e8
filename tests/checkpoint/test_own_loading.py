"""The same checkpoints with hf_shrink imported: exact, still packed, and saved again they are the same bytes."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from checkpoint.rows import IDS, ROWS, W4, inner_linears, llama, pack, pruned
from checkpoint.saved import Saved, logits_of
from safetensors.torch import load_file, save_file
from tiny import tiny_llama
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    CompressedTensorsConfig,
    CvtConfig,
    CvtForImageClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from transformers.pytorch_utils import Conv1D

import hf_shrink
from hf_shrink.checkpoint.packed import packed_modules
from hf_shrink.checkpoint.quantizers import register
from hf_shrink.errors import CheckpointError
from hf_shrink.runtime import PackedModule


def load(row: Saved, **options: object) -> PreTrainedModel:
    return getattr(transformers, row.kind).from_pretrained(row.folder, **options)


@pytest.mark.parametrize("name", ROWS)
def test_exact_packed_and_saved_again_the_same(name: str, saved_rows: dict[str, Saved], tmp_path: Path) -> None:
    row = saved_rows[name]
    model, info = load(row, output_loading_info=True)
    assert torch.equal(logits_of(model), row.logits)
    assert not any(info.values())

    packed = [name for name in load_file(row.folder / "model.safetensors") if name.endswith("weight_scale")]
    assert len({id(module.held) for module in packed_modules(model).values()}) == len(packed)

    model.save_pretrained(tmp_path)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / file).read_bytes() == (row.folder / file).read_bytes()


def test_registering_twice_changes_nothing() -> None:
    before = dict(transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING)
    register()
    assert before == transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING


def test_a_checkpoint_of_others_goes_the_stock_way(saved_rows: dict[str, Saved], tmp_path: Path) -> None:
    row = saved_rows["w4 group"]
    shutil.copytree(row.folder, tmp_path / "other")
    config = row.config()
    del config["hf_shrink"], config["quantization_config"]["hf_shrink"]
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    assert not packed_modules(model)
    assert type(model.get_submodule("model.layers.0.mlp.up_proj")) is torch.nn.Linear
    assert torch.allclose(logits_of(model), row.logits, rtol=1e-4, atol=1e-4)
    assert "save_pretrained" not in vars(model)


@pytest.mark.parametrize("name", ["w4 group", "embedding with tied head", "unevenly pruned", "unevenly pruned, w4"])
@pytest.mark.parametrize("options", [{"device_map": "cpu"}, {"device_map": "auto"}, {"dtype": torch.bfloat16}])
def test_device_map_and_dtype(name: str, options: dict, saved_rows: dict[str, Saved]) -> None:
    row = saved_rows[name]
    model = load(row, **options)
    found = logits_of(model)
    if "dtype" not in options:
        assert torch.equal(found, row.logits)
        return
    assert found.dtype == torch.bfloat16
    assert all(module.weight_scale.dtype == torch.bfloat16 for module in packed_modules(model).values())
    assert (found.float() - row.logits).abs().max() / row.logits.abs().max() < 0.05


def test_the_tied_head_holds_nothing_of_its_own(saved_rows: dict[str, Saved]) -> None:
    model = load(saved_rows["embedding with tied head"])
    head, embedding = model.lm_head, model.model.embed_tokens
    assert head.weight_packed is embedding.weight_packed
    assert head.weight_scale is embedding.weight_scale
    model.tie_weights()
    assert head.weight_packed is embedding.weight_packed
    assert "weight" not in head._parameters


@pytest.mark.parametrize("name", ["w4 group", "unevenly pruned", "unevenly pruned, w4", "embedding with tied head"])
def test_generates(name: str, saved_rows: dict[str, Saved]) -> None:
    model = load(saved_rows[name])
    prompt = torch.tensor(IDS)
    text = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, min_new_tokens=4)
    assert text[0, len(IDS[0])] == saved_rows[name].logits[0, -1].argmax()


@pytest.mark.parametrize("name", ["w4 group", "w4 group asymmetric", "conv1d", "embedding with tied head", "mixed"])
def test_dense_when_asked_for(name: str, saved_rows: dict[str, Saved], tmp_path: Path) -> None:
    row = saved_rows[name]
    for model in (load(row, quantization_config=CompressedTensorsConfig(dequantize=True)), load(row).dequantize()):
        assert not packed_modules(model)
        assert torch.allclose(logits_of(model), row.logits, rtol=1e-5, atol=1e-5)
        assert not hasattr(model, "hf_quantizer")
    if name == "conv1d":
        assert isinstance(model.transformer.h[0].attn.c_attn, Conv1D)
    if name == "embedding with tied head":
        assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    again = getattr(transformers, row.kind).from_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(logits_of(again), logits_of(model))


def test_an_uneven_model_is_an_ordinary_dense_one(saved_rows: dict[str, Saved], tmp_path: Path) -> None:
    model = load(saved_rows["unevenly pruned"])
    assert model.is_quantized is False
    assert not hasattr(model, "hf_quantizer")
    assert not hasattr(model.config, "quantization_config")
    assert copy.deepcopy(model).half().dtype == torch.float16

    before = model.model.layers[1].mlp.up_proj.weight.detach().clone()
    data = [{"input_ids": IDS[0], "labels": IDS[0]}] * 2
    arguments = TrainingArguments(
        tmp_path, max_steps=1, report_to=[], use_cpu=True, learning_rate=1e-2, save_strategy="no", disable_tqdm=True
    )
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    assert not torch.equal(before, model.model.layers[1].mlp.up_proj.weight)
    trainer.save_model(tmp_path / "trained")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert again.model.layers[1].mlp.up_proj.weight.shape == (64, 48)
    assert torch.equal(logits_of(again), logits_of(model))


@pytest.mark.parametrize(
    "name", ["w4 group", "unevenly pruned", "unevenly pruned, w4", "head apart from tied embedding"]
)
def test_the_bare_model_and_another_head(name: str, saved_rows: dict[str, Saved]) -> None:
    row = saved_rows[name]
    whole, bare = load(row), AutoModel.from_pretrained(row.folder)
    ids = torch.tensor(IDS)
    with torch.no_grad():
        expected = whole.model(ids).last_hidden_state
        assert torch.equal(bare(ids).last_hidden_state, expected)
    classifier, info = AutoModelForSequenceClassification.from_pretrained(row.folder, output_loading_info=True)
    assert info["missing_keys"] == {"score.weight"}
    with torch.no_grad():
        assert torch.equal(classifier.model(ids).last_hidden_state, expected)


@pytest.mark.parametrize("lost", ["weight_packed", "weight_scale", "weight_shape"])
def test_a_missing_tensor_is_an_error(lost: str, saved_rows: dict[str, Saved], tmp_path: Path) -> None:
    folder = shutil.copytree(saved_rows["w4 group"].folder, tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    del weights[f"model.layers.2.mlp.up_proj.{lost}"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"layers\.2\.mlp\.up_proj\.{lost}"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("tensor", "value"),
    [("weight_shape", torch.tensor([80, 47])), ("weight_scale", torch.full((80, 3), float("nan")))],
)
def test_a_damaged_tensor_is_an_error(
    tensor: str, value: torch.Tensor, saved_rows: dict[str, Saved], tmp_path: Path
) -> None:
    folder = shutil.copytree(saved_rows["w4 group"].folder, tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    weights[f"model.layers.2.mlp.up_proj.{tensor}"] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"up_proj\.{tensor}"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_pruned_without_its_shapes_is_an_error(saved_rows: dict[str, Saved], tmp_path: Path) -> None:
    folder = shutil.copytree(saved_rows["unevenly pruned"].folder, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    del config["hf_shrink"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="no hf_shrink block"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_loaded_model_can_be_packed_and_saved_once_more(tmp_path: Path) -> None:
    pruned({1: 64, 3: 48})().save_pretrained(tmp_path / "pruned")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    pack(model, dict.fromkeys(inner_linears(model), W4)).save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits_of(again), logits_of(model))
    assert isinstance(again.model.layers[3].mlp.down_proj, PackedModule)


def test_how_to_load_may_be_said_of_a_model_that_was_only_pruned(tmp_path: Path) -> None:
    model = pruned({1: 64, 3: 48})()
    model.save_pretrained(tmp_path)
    for asked in (hf_shrink.LoadingConfig(optimize=False), hf_shrink.LoadingConfig(dequantize=True)):
        again = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=asked)
        assert torch.equal(logits_of(again), logits_of(model))
        assert again.is_quantized is False


def test_another_tie_is_not_lost_when_the_head_is_packed_apart(tmp_path: Path) -> None:
    model = llama({"lm_head": W4}, tie_word_embeddings=True)()
    model.model.extra = torch.nn.Linear(48, 320, bias=False)
    model.model.extra.weight = model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert torch.equal(weights["model.extra.weight"], weights["model.embed_tokens.weight"])


def test_in_memory_and_loaded_agree_on_the_dense_model() -> None:
    """The helper rounds: a test that compared dense with dense would prove nothing."""
    assert not torch.equal(logits_of(llama({})()), logits_of(tiny_llama()))


def test_a_type_that_initialises_linears_by_their_weight_loads_dense_in_stock(tmp_path: Path) -> None:
    """CvT's `_init_weights` reads the weight of every Linear, which stock also asks of packed ones."""
    torch.manual_seed(0)
    config = CvtConfig(embed_dim=[32, 32, 32], num_heads=[1, 2, 2], depth=[1, 2, 3], num_labels=3)
    model = CvtForImageClassification(config).eval()
    recipe = {"steps": [{"quantize": {"method": "rtn", "scheme": "W8A16", "group_size": 32}}]}
    hf_shrink.shrink(model, recipe, progress=False)
    assert model.shrink_report.portable
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["dequantize"] is True
    again = CvtForImageClassification.from_pretrained(tmp_path).eval()
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(again(pixels).logits, model(pixels).logits)
