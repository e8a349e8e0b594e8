from __future__ import annotations

from collections.abc import Iterator

import datasets
import numpy as np
import pytest
import torch
from conformance.cases import CASES as DECODERS
from conformance.cases_encoders import CASES
from tiny import VOCABULARY, tiny_llama, tiny_tokenizer
from transformers import Wav2Vec2Config, Wav2Vec2Model

from hf_shrink.architectures import bind
from hf_shrink.calibration.capture import capture
from hf_shrink.calibration.data import CalibrationData, calibration_batches
from hf_shrink.calibration.labels import log_loss
from hf_shrink.calibration.targets import model_inputs as seq2seq_inputs
from hf_shrink.calibration.targets import targets_of
from hf_shrink.errors import CalibrationError
from hf_shrink.recipe import CalibrationSpec


def read(source: object, samples: int = 6, batch_size: int = 2, **options: object) -> CalibrationData:
    options = {"model": tiny_llama(), **options}
    return calibration_batches(
        CalibrationSpec(samples=samples, length=16, batch_size=batch_size), source=source, **options
    )


def ids(rows: int, length: int = 8) -> torch.Tensor:
    return torch.arange(rows * length).view(rows, length) % VOCABULARY


def test_batches_are_kept_in_order_and_cut_to_the_batch_size():
    data = read([{"input_ids": ids(3), "attention_mask": torch.ones(3, 8)}, {"input_ids": ids(1, 5)}])
    assert [tuple(b["input_ids"].shape) for b in data.batches] == [(2, 8), (1, 8), (1, 5)]
    assert torch.equal(torch.cat([b["input_ids"] for b in data.batches[:2]]), ids(3))
    assert data.tokens == 3 * 8 + 5 and data.notes == ()


def test_text_that_comes_as_embeddings_is_counted_by_its_positions():
    data = read([{"inputs_embeds": torch.randn(3, 8, 48)}, {"inputs_embeds": torch.randn(1, 5, 48)}])
    assert data.tokens == data.details["tokens"] == 3 * 8 + 5
    assert [tuple(b["inputs_embeds"].shape) for b in data.batches] == [(2, 8, 48), (1, 8, 48), (1, 5, 48)]


def test_an_endless_iterable_is_read_only_as_far_as_needed():
    def endless() -> Iterator[dict[str, torch.Tensor]]:
        while True:
            yield {"input_ids": ids(4)}

    data = read(endless())
    assert [len(b["input_ids"]) for b in data.batches] == [2, 2, 2]
    assert "only the first 6 rows" in data.notes[0]


def test_a_data_loader_and_a_tokenizers_output_work():
    loader = torch.utils.data.DataLoader([{"input_ids": row} for row in ids(6)], batch_size=3)
    assert [len(b["input_ids"]) for b in read(loader).batches] == [2, 1, 2, 1]
    encoded = [tiny_tokenizer()("The tide goes out.") for _ in range(2)]
    assert [b["input_ids"].shape[0] for b in read(encoded).batches] == [1, 1]


def test_arrays_and_lists_become_tensors_and_other_keys_are_named():
    data = read([{"input_ids": np.arange(8).reshape(2, 4), "names": ["a", "b"], "label_color": [1, 2]}])
    assert data.batches[0]["input_ids"].dtype == torch.int64 and set(data.batches[0]) == {"input_ids"}
    assert "left out: label_color, names" in data.notes[0]


def test_a_plain_module_gets_what_its_forward_takes():
    class Plain(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    data = read([{"x": torch.ones(2, 3, dtype=torch.float64), "y": torch.ones(2)}], model=Plain())
    assert set(data.batches[0]) == {"x"} and data.batches[0]["x"].dtype == torch.float64


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_labels_of_an_encoder_decoder_become_its_decoders_inputs(name):
    case = CASES[name]
    model = case.build()
    inputs = {n: v[:2] for n, v in case.inputs().items() if n != "decoder_input_ids"}
    labels = torch.tensor([[7, 8, 9, 2], [5, 2, -100, -100]])
    (batch,) = read([{**inputs, "labels": labels}], model=model).batches
    assert batch["decoder_input_ids"][:, 1:].tolist() == [[7, 8, 9], [5, 2, 0]]
    assert batch["decoder_attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    with torch.no_grad():
        expected = model(**inputs, labels=labels)
        scored = targets_of("seq2seq", batch, model(**seq2seq_inputs("seq2seq", batch)))
    found = torch.nn.functional.cross_entropy(scored.logits[scored.positions], scored.labels[scored.positions])
    assert torch.allclose(found, expected.loss, atol=1e-5)
    assert torch.allclose(scored.logits[scored.positions], expected.logits[labels != -100], atol=1e-4)
    assert len(capture(model, [b.module for b in bind(model).stacks[-1].blocks], [batch]).calls) == 1


def test_labels_that_cannot_be_shifted_are_an_error():
    model = CASES["bart"].build()
    model.config.pad_token_id = None
    batch = {"input_ids": ids(2), "labels": torch.tensor([[7, 2], [5, 2]])}
    with pytest.raises(CalibrationError, match="set decoder_start_token_id"):
        read([batch], model=model)


def test_classes_of_an_encoder_decoder_stay_labels():
    case = CASES["bart_classifier"]
    (batch,) = read([{**case.inputs(), "labels": torch.tensor([0, 1])}], model=case.build()).batches
    assert set(batch) == {"input_ids", "labels"}


@pytest.mark.parametrize(
    ("name", "key", "more"),
    [
        ("vit_classifier", "pixel_values", {"labels": torch.tensor(1)}),
        ("clip", "pixel_values", {}),
        ("whisper", "input_features", {"labels": torch.tensor([7, 2])}),
    ],
)
def test_an_image_or_sound_without_a_batch_dimension_is_one_row(name, key, more):
    model, value = CASES[name].build(), CASES[name].inputs()[key][0]
    data = read([{key: value, **more}] * 3, model=model)
    assert len(data.batches) == 3
    for batch in data.batches:
        assert torch.equal(batch[key], value[None])
        assert all(torch.equal(batch[other], expected[None]) for other, expected in more.items())


@pytest.mark.parametrize("label", [3, np.int64(3), torch.tensor(3)])
@pytest.mark.parametrize("rows", [1, None])
def test_the_class_of_a_single_row_may_be_a_number(label, rows):
    """A data set gives rows so; without a label `fisher` would draw one from the model."""
    model, value = CASES["vit_classifier"].build(), CASES["vit_classifier"].inputs()["pixel_values"][0]
    row = {"pixel_values": value.numpy() if rows is None else value[None], "labels": label, "output_attentions": True}
    (batch,) = read([row], model=model).batches
    assert set(batch) == {"pixel_values", "labels"} and batch["labels"].tolist() == [3]
    outputs = {"logits": torch.zeros(1, 7)}
    loss = log_loss("other", batch, outputs, "data", torch.Generator())
    assert float(loss) == pytest.approx(np.log(7))


def test_what_is_no_tensor_of_rows_is_named():
    batch = {**CASES["vit_classifier"].inputs(), "labels": 3}
    assert len(batch["pixel_values"]) > 1
    data = read([batch], model=CASES["vit_classifier"].build())
    assert "labels" not in data.batches[0]
    assert "not tensors with a row for every sample, left out: labels" in data.notes[-1]
    detection = {**CASES["vit_classifier"].inputs(), "labels": [{"boxes": [1, 2]}] * 2}
    assert "left out: labels" in read([detection], model=CASES["vit_classifier"].build()).notes[-1]


def test_sound_as_samples_may_come_without_a_batch_dimension():
    config = Wav2Vec2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    samples = torch.randn(800, generator=torch.Generator().manual_seed(0))
    data = read([{"input_values": samples}] * 3, model=Wav2Vec2Model(config))
    assert [tuple(b["input_values"].shape) for b in data.batches] == [(1, 800)] * 3


@pytest.mark.parametrize("shape", [(16, 16), (16, 16, 3)])
def test_an_image_in_another_layout_is_an_error(shape):
    with pytest.raises(CalibrationError, match=r"reads \(batch, channels, height, width\)"):
        read([{"pixel_values": torch.zeros(shape)}], model=CASES["vit"].build())


def test_patches_in_a_list_are_left_to_the_model():
    grid = torch.tensor([[1, 2, 4]])
    (batch,) = read(
        [{"pixel_values": torch.zeros(8, 48), "image_grid_thw": grid}], model=DECODERS["qwen2_vl"].build()
    ).batches
    assert batch["pixel_values"].shape == (8, 48) and torch.equal(batch["image_grid_thw"], grid)


def test_tensors_that_disagree_on_rows_stay_one_batch():
    batch = {"input_ids": ids(3), "position_ids": torch.arange(8)[None]}
    assert len(read([batch]).batches) == 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "empty"),
        (iter(()), "empty"),
        (3, "cannot be a int"),
        ({"input_ids": ids(1)}, "cannot be a dict"),
        ([{"input_ids": ids(1)}, "text"], "element 1 .* is a str"),
        (["text", {"input_ids": ids(1)}], "all texts or all dicts .* element 1 is a dict"),
        ([torch.ones(2)], "holds a Tensor"),
        ([{"pixels": ids(1)}], "nothing that LlamaForCausalLM reads: it has pixels"),
        ([{"input_ids": torch.zeros(0, 4, dtype=torch.long)}], "no rows"),
        ([{"input_ids": torch.tensor([[VOCABULARY]])}], "another model's tokenizer"),
        (datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": ["a"]})), r"dataset\['train'\]"),
    ],
)
def test_bad_sources_are_errors(source, message):
    with pytest.raises(CalibrationError, match=message):
        read(source, tokenizer=tiny_tokenizer())


def test_an_empty_data_set_is_an_error():
    with pytest.raises(CalibrationError):
        read(datasets.Dataset.from_dict({"text": []}), tokenizer=tiny_tokenizer())
