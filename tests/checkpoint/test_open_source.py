"""What can be wrong with a source is found before anything is computed, and said in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.cases_mixtures import MIXTURES
from safetensors.torch import load_file, save_file
from tiny import tiny_llama, tiny_tokenizer
from tiny_readers import tiny_clip, tiny_whisper
from transformers import (
    AutoModel,
    BertConfig,
    BertForMaskedLM,
    CLIPImageProcessor,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForSequenceClassification,
    WhisperFeatureExtractor,
)

from hf_shrink.checkpoint.measured import load_measured
from hf_shrink.checkpoint.shards import read_header
from hf_shrink.checkpoint.source import check_finite, load_processing, load_source_model, open_source
from hf_shrink.errors import CheckpointError


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def copied(dense: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dense, tmp_path / "model"))


def sharded(folder: Path) -> Path:
    tiny_llama().save_pretrained(folder, max_shard_size="100KB")
    return folder


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps(config))


def refused(path: object, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_source(path)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text


def test_a_whole_model_opens_and_loads(dense: Path) -> None:
    source = open_source(dense)
    assert source.folder == dense
    assert source.config["model_type"] == "llama"
    assert [shard.name for shard in source.shards] == ["model.safetensors"]
    model = load_source_model(source)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not model.training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny_llama().parameters(), strict=True))
    assert load_source_model(source, torch.bfloat16).dtype == torch.bfloat16


def test_shards_are_found(tmp_path: Path) -> None:
    source = open_source(sharded(tmp_path))
    assert len(source.shards) > 1
    assert load_source_model(source).config.hidden_size == 48


def test_the_class_is_the_one_that_was_saved(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1)
    BertForMaskedLM(config).save_pretrained(tmp_path)
    assert type(load_source_model(open_source(tmp_path))) is BertForMaskedLM


def test_a_class_that_transformers_does_not_have_is_refused(copied: Path) -> None:
    """Its own head would be dropped without a word."""
    change_config(copied, architectures=["LlamaForRewardModel"])
    with pytest.raises(CheckpointError, match=r"LlamaForRewardModel.*hf_shrink.shrink\(model"):
        load_source_model(open_source(copied))


def test_without_architectures_the_usual_class(copied: Path) -> None:
    change_config(copied, architectures=None)
    assert type(load_source_model(open_source(copied))).__name__ == "LlamaForCausalLM"


def test_missing_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no folder", "nowhere")
    refused("./nowhere", "no folder")
    refused("", "no folder")


def test_a_file_instead_of_a_folder(copied: Path) -> None:
    refused(copied / "model.safetensors", "is a file")


def test_an_id_that_cannot_be_had() -> None:
    refused("nobody/has-this-model", "nobody/has-this-model", "neither a folder")


def test_no_config(copied: Path) -> None:
    (copied / "config.json").unlink()
    refused(copied, "config.json")


@pytest.mark.parametrize("text", ["{", "[1]", "{}"])
def test_a_broken_config(text: str, copied: Path) -> None:
    (copied / "config.json").write_text(text)
    refused(copied, "config.json")


@pytest.mark.parametrize("where", ["top", "text_config"])
def test_already_quantized_names_the_method(where: str, copied: Path) -> None:
    block = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    change_config(copied, **(block if where == "top" else {"text_config": block}))
    refused(copied, "quantized already", "gptq")
    assert open_source(copied, dense=False).config["model_type"] == "llama"


def test_pickled_weights_are_refused(copied: Path) -> None:
    torch.save(load_file(copied / "model.safetensors"), copied / "pytorch_model.bin")
    (copied / "model.safetensors").unlink()
    refused(copied, "pickled", "safetensors")


def test_no_weights(copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    refused(copied, "no weights")


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_file_that_is_cut_short(length: int, copied: Path) -> None:
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    refused(copied, "model.safetensors", "download")


def test_a_file_that_is_too_long(copied: Path) -> None:
    with (copied / "model.safetensors").open("ab") as file:
        file.write(b"more")
    refused(copied, "model.safetensors", "by its header")


def test_a_header_that_is_not_one(copied: Path) -> None:
    (copied / "model.safetensors").write_bytes((4).to_bytes(8, "little") + b"[{}]")
    refused(copied, "broken safetensors header")


def test_a_missing_shard(tmp_path: Path) -> None:
    sharded(tmp_path)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    refused(tmp_path, shard.name, "index")


def test_a_shard_without_its_tensor(tmp_path: Path) -> None:
    sharded(tmp_path)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[0]
    weights = load_file(shard)
    lost = sorted(weights)[0]
    del weights[lost]
    save_file(weights, shard)
    refused(tmp_path, lost, shard.name)


def test_an_index_that_points_outside(tmp_path: Path) -> None:
    sharded(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["model.norm.weight"] = "../other.safetensors"
    index.write_text(json.dumps(data))
    refused(tmp_path, "outside")


def test_the_header_lists_the_tensors(dense: Path) -> None:
    header = read_header(dense / "model.safetensors")
    assert header.keys() == load_file(dense / "model.safetensors").keys()
    assert header["model.norm.weight"]["shape"] == [48]


def test_a_weight_that_is_missing_is_not_made_up(copied: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        load_source_model(open_source(copied))


def test_weights_of_another_shape(copied: Path) -> None:
    change_config(copied, intermediate_size=96)
    for load in (load_source_model, lambda source: load_measured(source.folder)):
        with pytest.raises(CheckpointError, match="does not load") as caught:
            load(open_source(copied))
        said = (
            "model.layers.0.mlp.down_proj.weight is stored as [48, 80], and [48, 96] is what LlamaForCausalLM has by "
        )
        assert f"{said}config.json, and 11 more do not fit" in str(caught.value)


def test_one_weight_of_another_shape(copied: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"][:40].clone()
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is stored as \[40\], and \[48\] is what .*; down"):
        load_source_model(open_source(copied))


def test_experts_that_cannot_be_joined(tmp_path: Path) -> None:
    MIXTURES["mixtral"]().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    save_file({**weights, name: weights[name][:3].clone()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"report! transformers shows it for MixtralForCausalLM\.from_pretrained"):
        load_source_model(open_source(tmp_path))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(value: float, copied: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    weights["model.layers.2.self_attn.k_proj.weight"][3, 5] = value
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.2\.self_attn\.k_proj\.weight.*NaN or Inf"):
        load_source_model(open_source(copied))


def test_integers_are_finite() -> None:
    module = torch.nn.Linear(2, 2)
    module.register_buffer("whole", torch.tensor([1, 2]))
    check_finite(module)


def test_no_code_from_a_checkpoint_is_run(copied: Path) -> None:
    (copied / "modeling_own.py").write_text("raise SystemExit('the code ran')")
    change_config(copied, model_type="own", auto_map={"AutoModel": "modeling_own.Own"})
    with pytest.raises(CheckpointError, match="trust_remote_code"):
        load_source_model(open_source(copied))


def test_the_tokenizer_is_found(dense: Path) -> None:
    tokenizer = load_processing(open_source(dense))
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert tokenizer("the sand").input_ids == tiny_tokenizer()("the sand").input_ids


def test_a_model_without_a_tokenizer(copied: Path) -> None:
    for path in copied.glob("tokenizer*"):
        path.unlink()
    assert load_processing(open_source(copied)) is None


def test_a_broken_tokenizer(copied: Path) -> None:
    (copied / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer"):
        load_processing(open_source(copied))


def tiny_wav2vec2() -> Wav2Vec2ForSequenceClassification:
    layers = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    convolutions = {"conv_dim": (8, 8), "conv_stride": (8, 8), "conv_kernel": (10, 8), "num_conv_pos_embeddings": 4}
    return Wav2Vec2ForSequenceClassification(
        Wav2Vec2Config(**layers, **convolutions, num_feat_extract_layers=2, num_conv_pos_embedding_groups=2)
    )


@pytest.mark.parametrize(
    ("build", "reader", "medium"),
    [
        (tiny_wav2vec2, Wav2Vec2FeatureExtractor(), "input_values"),
        (tiny_whisper, WhisperFeatureExtractor(feature_size=16), "input_features"),
        (tiny_clip, CLIPImageProcessor(size={"shortest_edge": 32}), "pixel_values"),
    ],
    ids=["wav2vec2", "whisper", "clip"],
)
def test_what_reads_images_or_sounds_needs_no_tokenizer(build: Any, reader: Any, medium: str, tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    reader.save_pretrained(tmp_path)
    found = load_processing(open_source(tmp_path))
    assert type(found) is type(reader) and medium in found.model_input_names
    given = torch.rand(3, 48, 48) if medium == "pixel_values" else torch.rand(1600).numpy()
    options = {} if medium == "pixel_values" else {"sampling_rate": 16000}
    assert (found(given, **options)[medium][0] == reader(given, **options)[medium][0]).all()


def test_a_bare_model(tmp_path: Path) -> None:
    bare = tiny_llama().model
    bare.save_pretrained(tmp_path)
    assert type(load_source_model(open_source(tmp_path))) is type(bare)
    assert isinstance(AutoModel.from_pretrained(tmp_path), type(bare))


def test_a_model_that_does_not_fit_its_device_is_told_with_the_remedy(
    dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: object, **named: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", full)
    with pytest.raises(CheckpointError, match="does not fit cuda:0; take --device cpu"):
        load_measured(dense, device="cuda:0")
