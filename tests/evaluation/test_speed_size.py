"""Speed, sizes and completions: what is counted, not how fast this machine is."""

from __future__ import annotations

from types import SimpleNamespace

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

from hf_shrink import shrink
from hf_shrink.errors import ArchitectureError, CheckpointError, RecipeError
from hf_shrink.evaluation import (
    Workload,
    compare_decode_speed,
    greedy_completion,
    measure_speed,
    stored_bytes,
    timing,
    unique_bytes,
)
from hf_shrink.evaluation.costs import add_costs
from hf_shrink.evaluation.greedy import greedy_config
from hf_shrink.evaluation.observed import Observed

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}


def counted(model):
    """The lengths of what goes into each forward pass."""
    lengths = []
    model.register_forward_pre_hook(
        lambda m, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return lengths


def test_decoding_makes_exactly_the_tokens_it_times():
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[2] = 9  # the end of text is likely everywhere
    lengths = counted(model)
    found = measure_speed({"one": model}, Workload(prompt=5, new=6, prefill=20, repeats=2))
    warm_up, run = [5, 1, 1, 1, 20], [5, 1, 1, 1, 1, 1, 20]
    assert lengths == warm_up + run * 2
    timings = found["one"]
    assert {task: (t.unit, t.amount) for task, t in timings.items()} == {
        "decode": ("token", 5),
        "first token": ("token", 5),
        "prefill": ("token", 20),
    }
    assert all(len(t.seconds) == len(t.cpu_seconds) == 2 and min(t.seconds) > 0 for t in timings.values())


def test_the_first_token_ends_before_the_others_begin(monkeypatch):
    ticks = iter(range(100))  # a clock that goes on by one whenever it is looked at
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(ticks)))
    spent = timing.time_generation(tiny_llama(), {"input_ids": torch.ones(1, 3, dtype=torch.long)}, greedy(4))
    assert spent.first.wall == 2  # start, prompt handed over, first token
    assert spent.rest.wall == 3


def greedy(new):
    return greedy_config(tiny_llama(), new, exactly=True)


def test_a_batch_counts_all_of_its_tokens():
    found = measure_speed({"one": tiny_llama()}, Workload(prompt=5, new=3, prefill=8, batch=2, repeats=1))["one"]
    assert [found[task].amount for task in ("decode", "first token", "prefill")] == [4, 10, 16]


def test_tokens_fit_the_positions():
    model = tiny_llama(max_position_embeddings=16)
    lengths = counted(model)
    measure_speed({"one": model}, Workload(repeats=1))
    assert lengths == [8, 1, 1, 1, 15, 8, *[1] * 7, 15]
    assert Workload(prompt=4, new=8).fitted([model]) == Workload(prompt=4, new=8, prefill=15)


def test_a_model_that_writes_nothing_has_all_positions_for_its_input():
    model = BertModel(BertConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **SMALL)).eval()
    assert Workload(prompt=60, new=32, prefill=80).fitted([model]) == Workload(prompt=60, new=32, prefill=64)
    lengths = counted(model)
    measure_speed({"one": model}, Workload(prompt=60, new=32, prefill=0, repeats=1))
    assert lengths == [60, 60]


@pytest.fixture
def waited(monkeypatch):
    """The devices that are waited for, where there is an accelerator."""
    found = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device=None: found.append(device))
    return found


def test_the_device_is_waited_for_that_does_the_work(waited):
    """By itself torch waits for the first one."""
    device = torch.device("meta")  # any that is not the CPU
    model = ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, **SMALL)).eval().to(device)
    measure_speed({"one": model}, Workload(repeats=1))
    assert waited == [device] * 4
    add_costs(Observed(), {"seconds"}, {"model": model})
    assert set(waited) == {device} and len(waited) > 4
    timing.now(torch.device("cpu"))
    assert set(waited) == {device}


def test_generation_waits_for_the_device_of_its_inputs(waited):
    device = torch.device("cuda", 1)

    class Writer:
        def generate(self, streamer, **given):
            for _ in range(3):
                streamer.put(None)

    timing.time_generation(Writer(), {"input_ids": SimpleNamespace(device=device)}, None)
    assert waited == [device] * 4


@pytest.mark.parametrize("wrong", [{"new": 1}, {"prompt": 0}, {"prefill": -1}, {"batch": 0}, {"repeats": 0}])
def test_a_workload_that_times_nothing_is_refused(wrong):
    with pytest.raises(RecipeError, match=next(iter(wrong))):
        Workload(**wrong)


def test_what_was_not_compiled_is_not_called_so(monkeypatch):
    model = tiny_llama()
    monkeypatch.setattr(type(model), "_valid_auto_compile_criteria", lambda *_: False)
    with pytest.raises(ArchitectureError, match="compiles"):
        measure_speed({"one": model}, Workload(prompt=3, new=2, prefill=0, repeats=1), compiled={"one"})


def test_comparison_alternates():
    dense, small = tiny_llama(), tiny_llama(1)
    order = []
    for name, model in (("dense", dense), ("small", small)):
        model.register_forward_hook(lambda *_, name=name: order.append(name))
    result = compare_decode_speed(dense, small, prompt=3, new=2, repeats=2)
    warm_up, runs = ["dense"] * 4 + ["small"] * 4, ["dense", "dense", "small", "small"] * 2
    assert order == warm_up + runs
    assert result["unit"] == "tokens/s"
    assert result["speedup"] == pytest.approx(result["compressed"] / result["dense"])
    for name in ("dense", "compressed"):
        least, greatest = result["spread"][name]
        assert least <= result[name] <= greatest


def test_the_models_own_sampling_settings_do_not_matter():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    before = greedy_completion(model, tokenizer, "The", new=6)
    model.generation_config.update(do_sample=True, temperature=5.0, num_beams=3, max_length=4, eos_token_id=[2, 3])
    assert greedy_completion(model, tokenizer, "The", new=6) == before
    lengths = counted(model)
    measure_speed({"one": model}, Workload(prompt=5, new=6, prefill=0, repeats=1))
    assert lengths == [5, 1, 1, 1, 5, 1, 1, 1, 1, 1]
    assert model.generation_config.temperature == 5.0


def test_two_towers_read_both():
    text = CLIPTextConfig(vocab_size=VOCABULARY, **SMALL)
    vision = CLIPVisionConfig(image_size=16, patch_size=8, **SMALL)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict())).eval()
    seen = []
    model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    assert measure_speed({"one": model}, Workload(repeats=1))["one"].keys() == {"forward", "long forward"}
    assert seen == [{"input_ids", "attention_mask", "pixel_values"}] * 4


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_models_that_do_not_generate_run_forward(family):
    if family == "bert":
        model = BertModel(BertConfig(vocab_size=VOCABULARY, **SMALL)).eval()
    else:
        model = ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, **SMALL)).eval()
    found = measure_speed({"one": model}, Workload(batch=3, repeats=1))["one"]
    assert found.keys() == ({"forward", "long forward"} if family == "bert" else {"forward"})
    assert {(t.unit, t.amount) for t in found.values()} == {("pass", 3)}
    assert compare_decode_speed(model, model, repeats=1)["unit"] == "passes/s"


def test_tied_weights_count_once(tmp_path):
    tied, untied = tiny_llama(tie_word_embeddings=True), tiny_llama(tie_word_embeddings=False)
    assert unique_bytes(untied) - unique_bytes(tied) == VOCABULARY * 48 * 4
    assert any(name.endswith("inv_freq") for name, _ in untied.named_buffers())  # which is not saved
    assert unique_bytes(untied) == sum(t.numel() * t.element_size() for t in untied.state_dict().values())
    tied.save_pretrained(tmp_path)
    loaded = type(tied).from_pretrained(tmp_path)
    assert unique_bytes(loaded) == unique_bytes(tied)


def test_views_of_one_storage_count_by_their_own_elements():
    module, whole = torch.nn.Module(), torch.zeros(10, 4)
    module.register_buffer("first", whole[:5])
    module.register_buffer("second", whole[5:])
    assert unique_bytes(module) == 160
    module.register_buffer("again", whole[5:])
    module.weight = torch.nn.Parameter(torch.zeros(1000, 4)[:3])
    assert unique_bytes(module) == 160 + 48
    assert unique_bytes(torch.nn.Linear(4, 3, device="meta")) == 60


@pytest.mark.parametrize("views", ["one storage for all", "a part of a larger table"])
def test_bytes_of_a_run_are_those_of_its_tensors_wherever_they_lie(views):
    plain, model = (tiny_llama(num_hidden_layers=2) for _ in range(2))
    if views == "one storage for all":
        flat = torch.cat([parameter.data.flatten() for parameter in model.parameters()])
        pieces = flat.split([parameter.numel() for parameter in model.parameters()])
        for parameter, piece in zip(model.parameters(), pieces, strict=True):
            parameter.data = piece.view_as(parameter)
    else:
        head = model.lm_head.weight.data
        model.lm_head.weight = torch.nn.Parameter(torch.cat([head, torch.zeros(4096, head.shape[1])])[: len(head)])
    reports = [
        shrink(m, {"steps": [{"quantize": {"method": "rtn", "group_size": 16}}]}, progress=False).shrink_report
        for m in (plain, model)
    ]
    assert reports[0].bytes_before == sum(p.nbytes for p in tiny_llama(num_hidden_layers=2).parameters())
    assert [r.bytes_before for r in reports] == [reports[0].bytes_before] * 2
    assert [r.bytes_after for r in reports] == [reports[0].bytes_after] * 2
    assert reports[0].bytes_after == sum(t.nbytes for t in plain.state_dict().values())


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
