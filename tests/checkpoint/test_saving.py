"""What goes along with `save_pretrained`, and copies of a model that save themselves."""

from __future__ import annotations

import copy
import json
import pickle
from importlib import metadata
from pathlib import Path

import pytest
import torch
from checkpoint.rows import ROWS, W4, W8, inner_linears, llama, pack
from checkpoint.saved import Saved, logits_of
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import tiny_llama
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel, integrations

import hf_shrink  # noqa: F401  registers the loaders
from hf_shrink.checkpoint.record import ShrinkRecord, current_versions, read_record
from hf_shrink.checkpoint.save import bind
from hf_shrink.checkpoint.shards import one_layout
from hf_shrink.errors import CheckpointError
from hf_shrink.plan import Plan, Scheme
from hf_shrink.report import ShrinkReport


def record(card: str | None = None) -> ShrinkRecord:
    plan = Plan("llama", schemes={"model.layers.0.mlp.up_proj": Scheme(4)}, method="rtn")
    report = ShrinkReport(parameters_before=3, bytes_after=2, notes=["a note"], block_errors={"model.layers.0": 0.5})
    return ShrinkRecord("somewhere/model", {"name": "mine", "steps": []}, plan, report, card=card)


def packed_llama() -> PreTrainedModel:
    return llama({}, W4)()


@pytest.mark.parametrize("name", ROWS)
def test_the_files_are_stock_ones(name: str, saved_rows: dict[str, Saved]) -> None:
    with safe_open(saved_rows[name].folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    config = saved_rows[name].config()
    assert config["hf_shrink"]["format"] == 1
    assert config["architectures"] == [saved_rows[name].kind]
    assert bool(config["hf_shrink"]["shapes"]) == name.startswith("unevenly")


def test_saving_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = packed_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    assert not hasattr(model.config, "quantization_config")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_adapters_that_transformers_added_are_saved_alone_as_ever(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = tiny_llama()
    bind(model)
    monkeypatch.setattr(integrations.peft, "MIN_PEFT_VERSION", "0.18")  # transformers asks for one to come
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    found = load_file(tmp_path / "adapter_model.safetensors")
    wanted = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert len(found) == len(wanted) == 8
    for name, tensor in wanted.items():
        assert torch.equal(found[f"base_model.model.{name}".replace(".default", "")], tensor)


def test_a_tied_pair_is_written_once_also_after_a_move(tmp_path: Path) -> None:
    model = llama({"model.embed_tokens": W8, "lm_head": W8}, tie_word_embeddings=True)()
    before = model.lm_head.weight_packed
    model._apply(torch.clone)  # as a move to another device does
    assert model.lm_head.weight_packed is model.model.embed_tokens.weight_packed is not before
    model.save_pretrained(tmp_path)
    assert not [name for name in load_file(tmp_path / "model.safetensors") if name.startswith("lm_head")]
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path)), logits_of(model))


@pytest.mark.parametrize("name", ["w4 group", "unevenly pruned, w4", "embedding with tied head"])
def test_shards(name: str, tmp_path: Path) -> None:
    model = ROWS[name].build()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path)), logits_of(model))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("name", ["w4 group", "unevenly pruned", "embedding with tied head"])
def test_a_copy_saves_its_own_weights(name: str, duplicate, tmp_path: Path) -> None:
    model = ROWS[name].build()
    other = duplicate(model)
    with torch.no_grad():
        other.model.norm.weight.mul_(3)
    other.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.model.norm.weight, other.model.norm.weight)
    assert torch.equal(logits_of(again), logits_of(other))
    assert not torch.equal(logits_of(again), logits_of(model))
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]


def test_a_part_of_the_model_can_be_saved_on_its_own(tmp_path: Path) -> None:
    model = packed_llama()
    model.model.save_pretrained(tmp_path)
    again = type(model.model).from_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(again(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_a_record_is_made_where_a_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not after hours of work: a run that does not use bitsandbytes ends well without it."""
    installed = metadata.version

    def version(name: str) -> str:
        if name == "bitsandbytes":
            raise metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(metadata, "version", version)
    found = current_versions()
    assert (found["bitsandbytes"], found["torch"]) == ("not installed", installed("torch"))


def test_record_and_card_go_along_and_come_back(tmp_path: Path) -> None:
    model = packed_llama()
    bind(model, record("---\ntags: [x]\n---\nA card.\n"))
    model.save_pretrained(tmp_path / "first")
    data = json.loads((tmp_path / "first" / "shrink.json").read_text())
    assert set(data) == {"hf_shrink_version", "source", "recipe", "plan", "report", "versions"}
    packages = {"hf_shrink", "torch", "transformers", "compressed-tensors", "bitsandbytes", "python"}
    assert packages == set(data["versions"])

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    assert again.shrink_record == model.shrink_record
    assert again.shrink_report.notes == ["a note"]
    again.save_pretrained(tmp_path / "second")
    for name in ("shrink.json", "README.md"):
        assert (tmp_path / "first" / name).read_text() == (tmp_path / "second" / name).read_text()


def test_a_record_is_the_same_after_a_round_trip() -> None:
    assert ShrinkRecord.from_dict(json.loads(json.dumps(record().to_dict()))) == record()


@pytest.mark.parametrize("text", ["{", "[]", '{"source": 1}'])
def test_a_damaged_record_is_an_error_but_the_model_loads(text: str, tmp_path: Path) -> None:
    model = packed_llama()
    model.save_pretrained(tmp_path)
    (tmp_path / "shrink.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"shrink\.json"):
        read_record(tmp_path / "shrink.json")
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(again), logits_of(model))
    assert not hasattr(again, "shrink_record")


def test_without_a_record_pushing_goes_the_stock_way(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(PreTrainedModel, "push_to_hub", lambda model, repo_id, **options: calls.append(repo_id))
    packed_llama().push_to_hub("me/small")
    assert calls == ["me/small"]


def test_a_difference_that_stock_would_not_notice_is_not_saved(tmp_path: Path) -> None:
    model = tiny_llama()
    model.config.hf_shrink = {"format": 1, "shapes": {}, "attributes": {"model.layers.1.self_attn": {"scaling": 2}}}
    bind(model)
    with pytest.raises(CheckpointError, match="without noticing"):
        model.save_pretrained(tmp_path)


def test_offered_to_another_process_the_state_dict_is_the_one_given(tmp_path: Path) -> None:
    """Trainer hands over a gathered state dict."""
    model = packed_llama()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["model.norm.weight"] += 1
    model.save_pretrained(tmp_path, state_dict=state)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["model.norm.weight"], state["model.norm.weight"])


def test_names_of_tensors_are_those_of_the_bare_checkpoint(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=320, n_embd=48, n_layer=1, n_head=3, n_positions=64)
    model = GPT2LMHeadModel(config)
    pack(model, dict.fromkeys(inner_linears(model), W8)).save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert {f"transformer.h.0.mlp.c_fc.weight_{part}" for part in ("packed", "scale", "shape")} <= names
    assert "lm_head.weight" not in names


def test_a_loaded_model_saves_the_state_dict_that_it_is_given(tmp_path: Path) -> None:
    """transformers asks the quantizer for another one; it has to be the same."""
    packed_llama().save_pretrained(tmp_path / "first")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["model.norm.weight"] += 1
    model.save_pretrained(tmp_path / "second", state_dict=state)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert torch.equal(second["model.norm.weight"], state["model.norm.weight"])
    model.save_pretrained(tmp_path / "third")  # its own again
    third = load_file(tmp_path / "third" / "model.safetensors")
    assert torch.equal(third["model.norm.weight"], model.model.norm.weight)


@pytest.mark.parametrize("variant", [None, "new"])
@pytest.mark.parametrize("sizes", [("20KB", "5GB"), ("5GB", "20KB")])
def test_older_weights_of_the_other_layout_go(sizes: tuple[str, str], variant: str | None, tmp_path: Path) -> None:
    model = packed_llama()
    model.save_pretrained(tmp_path, max_shard_size=sizes[0], variant=variant)
    others = ["optimizer.safetensors", f"model{'' if variant else '.other'}.safetensors", "pytorch_model.bin"]
    for name in others:
        (tmp_path / name).write_text("of somebody else")
    with torch.no_grad():
        model.model.norm.weight.mul_(3)
    model.save_pretrained(tmp_path, max_shard_size=sizes[1], variant=variant)
    assert all((tmp_path / name).read_text() == "of somebody else" for name in others)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, variant=variant)
    assert torch.equal(again.model.norm.weight, model.model.norm.weight)
    dot = f".{variant}" if variant else ""
    names = (f"model{dot}.safetensors", f"model.safetensors.index{dot}.json")
    assert [(tmp_path / name).is_file() for name in names] == [sizes[1] == "5GB", sizes[1] == "20KB"]
    assert not list(tmp_path.glob("model*-00001-of-*")) or sizes[1] == "20KB"


@pytest.mark.parametrize("written", [False, True])
def test_weights_stay_where_another_process_saves_or_nothing_was_written(written: bool, tmp_path: Path) -> None:
    names = ("model.safetensors", "model.safetensors.index.json")
    for name in names:
        (tmp_path / name).write_text("old")
    with one_layout(tmp_path, None, is_main_process=not written):
        if written:
            (tmp_path / names[0]).write_text("newer")
    assert all((tmp_path / name).is_file() for name in names)
