from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
from conformance.cases_encoders import CASES
from PIL import Image
from tiny import tiny_llama, tiny_tokenizer
from tiny_readers import CLS, SEP, encoder_tokenizer, tiny_bert, tiny_clip, tiny_vit, tiny_whisper
from transformers import Wav2Vec2FeatureExtractor, WhisperFeatureExtractor
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_shrink.architectures import bind
from hf_shrink.calibration.capture import capture
from hf_shrink.calibration.data import CalibrationData, calibration_batches
from hf_shrink.calibration.inputs import inputs_of
from hf_shrink.calibration.media import media_rows
from hf_shrink.calibration.noise import as_pixels, noise_images, pink_noise
from hf_shrink.errors import CalibrationError
from hf_shrink.recipe import CalibrationSpec


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    # The library waits five seconds after every shuffled stream, for a bug of pyarrow that local files do not have.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


def image_processor() -> ViTImageProcessorPil:
    return ViTImageProcessorPil(size={"height": 32, "width": 32})


def extractor() -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(feature_size=16, chunk_length=1, sampling_rate=16000)


def pictures(count: int) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)) for i in range(count)]


def read(
    source: object = "self", *, model: torch.nn.Module, samples: int = 5, batch_size: int = 2, **options: object
) -> CalibrationData:
    return calibration_batches(
        CalibrationSpec(samples=samples, length=16, batch_size=batch_size), source=source, model=model, **options
    )


def test_noise_has_the_spectrum_of_natural_images_and_sounds():
    generator = torch.Generator().manual_seed(0)
    image = pink_noise((64, 1, 64, 64), 2, generator)
    assert image.mean().abs() < 1e-5 and image.square().mean().item() == pytest.approx(1, abs=1e-4)
    amplitude = torch.fft.fft2(image).abs().square().mean(dim=(0, 1)).sqrt()
    # Amplitude falls as 1/f in images: four times the frequency, a quarter of the amplitude.
    assert (amplitude[0, 4] / amplitude[0, 16]).item() == pytest.approx(4, rel=0.2)
    sound = pink_noise((64, 1024), 1, generator)
    amplitude = torch.fft.fft(sound).abs().square().mean(dim=0).sqrt()
    assert (amplitude[16:32].mean() / amplitude[256:512].mean()).item() == pytest.approx(4, rel=0.2)


def test_noise_pixels_use_the_range_of_a_photograph():
    pixels = as_pixels(noise_images(8, 3, 32, 32, torch.Generator().manual_seed(0))).float() / 255
    assert pixels.mean().item() == pytest.approx(0.45, abs=0.03) and pixels.std().item() == pytest.approx(
        0.25, abs=0.04
    )


@pytest.mark.parametrize("processor", [None, image_processor()])
def test_self_for_a_vision_model_is_noise_and_says_so(processor):
    model = tiny_vit()
    data = read(model=model, tokenizer=processor)
    assert [tuple(b["pixel_values"].shape) for b in data.batches] == [(2, 3, 32, 32), (2, 3, 32, 32), (1, 3, 32, 32)]
    assert data.tokens == 0 and "noise" in data.description and "calibrates better" in data.notes[0]
    assert all(torch.isfinite(model(**batch).last_hidden_state).all() for batch in data.batches)
    again, other = read(model=model, tokenizer=processor), read(model=model, tokenizer=processor, purpose="evaluation")
    assert torch.equal(data.batches[0]["pixel_values"], again.batches[0]["pixel_values"])
    assert not torch.equal(data.batches[0]["pixel_values"], other.batches[0]["pixel_values"])


def test_images_come_in_the_models_dtype():
    model = tiny_vit().bfloat16()
    data = read(model=model)
    assert data.batches[0]["pixel_values"].dtype == torch.bfloat16
    assert torch.isfinite(model(**data.batches[0]).last_hidden_state).all()


def test_a_two_tower_model_gets_noise_and_random_text_that_it_can_run():
    model = tiny_clip()
    data = read(model=model, tokenizer=encoder_tokenizer())
    batch = data.batches[0]
    assert batch["input_ids"].shape == (2, 16) and batch["pixel_values"].shape == (2, 3, 32, 32)
    assert batch["input_ids"][:, 0].eq(CLS).all() and batch["input_ids"][:, -1].eq(SEP).all()
    assert torch.isfinite(model(**batch).logits_per_image).all()
    assert any("random tokens" in note for note in data.notes) and any("noise" in note for note in data.notes)


def test_a_two_tower_model_takes_real_text_too():
    data = read(["The tide goes out. " * 30], model=tiny_clip(), tokenizer=encoder_tokenizer())
    assert data.batches[0]["input_ids"].shape == (2, 16) and data.batches[0]["pixel_values"].shape[0] == 2
    assert len(data.notes) == 1 and "noise" in data.notes[0]


@pytest.mark.parametrize("processor", [None, extractor()])
def test_self_for_a_speech_model_is_noise_with_text_from_its_decoder(processor):
    model = tiny_whisper()
    data = read(model=model, tokenizer=processor)
    batch = data.batches[0]
    assert batch["input_features"].shape == (2, 16, 100)
    assert batch["decoder_input_ids"].shape == (2, 4) and batch["decoder_input_ids"][:, 0].eq(1).all()
    assert torch.isfinite(model(**batch).logits).all()
    again = read(model=model, tokenizer=processor)
    assert torch.equal(batch["decoder_input_ids"], again.batches[0]["decoder_input_ids"])


@pytest.mark.parametrize("streaming", [False, True])
def test_an_image_recipe_goes_through_the_processor(tmp_path, streaming):
    folder = tmp_path / "set"
    folder.mkdir()
    images = datasets.Dataset.from_dict({"label": list(range(7)), "picture": pictures(7)})
    images = images.cast_column("picture", datasets.Image())
    images.to_parquet(folder / "train.parquet")
    recipe = tmp_path / "pictures.yaml"
    recipe.write_text(f"kind: image\ndataset: {folder}\nstreaming: {str(streaming).lower()}\n")
    data = read(recipe, model=tiny_vit(), tokenizer=image_processor(), samples=9)
    assert sum(len(b["pixel_values"]) for b in data.batches) == 7
    assert "7 images instead of 9" in data.notes[0] and data.description == "7 images of pictures"
    expected = image_processor()(pictures(7), return_tensors="pt")["pixel_values"]
    got = torch.cat([b["pixel_values"] for b in data.batches])
    distances = (got[:, None] - expected[None]).abs().amax(dim=(2, 3, 4))
    assert distances.min(dim=1).values.max() < 1e-5 and len(set(distances.argmin(dim=1).tolist())) == 7
    with pytest.raises(CalibrationError, match="image processor"):
        read(recipe, model=tiny_vit())
    with pytest.raises(CalibrationError, match="is image, which LlamaForCausalLM does not read"):
        read(recipe, model=tiny_llama(), tokenizer=tiny_tokenizer())


def test_a_model_of_one_channel_gets_images_of_one(tmp_path):
    config = tiny_vit().config
    config.num_channels = 1
    model = type(tiny_vit())(config).eval()
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.5], image_std=[0.5])
    for mode in ("L", "RGB"):
        images = datasets.Dataset.from_dict({"image": [image.convert(mode) for image in pictures(3)]})
        images = images.cast_column("image", datasets.Image())
        data = read(images, model=model, tokenizer=processor, samples=3, batch_size=3)
        assert data.batches[0]["pixel_values"].shape == (3, 1, 32, 32)
        assert torch.isfinite(model(**data.batches[0]).last_hidden_state).all()


def test_a_data_set_of_sounds_goes_through_the_feature_extractor():
    waves = [np.sin(np.arange(4000 + 50 * i) / (i + 3)).astype(np.float32) for i in range(4)]
    sounds = [{"array": wave, "sampling_rate": 16000} for wave in waves]
    data = read(datasets.Dataset.from_dict({"audio": sounds}), model=tiny_whisper(), tokenizer=extractor(), samples=4)
    got = torch.cat([b["input_features"] for b in data.batches])
    expected = extractor()(waves, sampling_rate=16000, return_tensors="pt")["input_features"]
    distances = (got[:, None] - expected[None]).abs().amax(dim=(2, 3))
    assert distances.min(dim=1).values.max() < 1e-4 and len(set(distances.argmin(dim=1).tolist())) == 4
    wrong = datasets.Dataset.from_dict({"audio": [{"array": waves[0], "sampling_rate": 8000}]})
    with pytest.raises(CalibrationError, match="8000 samples a second"):
        read(wrong, model=tiny_whisper(), tokenizer=extractor())


def test_clips_for_raw_waveform_models_have_one_length():
    model = tiny_whisper()
    inputs = inputs_of(model)
    waveform = type(inputs)("input_values", False, "input_values", False, False, frozenset({"input_values"}))
    rows = [{"audio": {"array": [0.1] * n, "sampling_rate": 16000}} for n in (100, 90000)]
    assert media_rows(rows, "audio", model, waveform, Wav2Vec2FeatureExtractor(), 2).shape == (2, 80000)


def test_data_sets_of_model_inputs_are_stacked():
    dataset = datasets.Dataset.from_dict(
        {"pixel_values": torch.randn(5, 3, 32, 32).tolist(), "label": [0] * 5}
    ).with_format("torch")
    data = read(dataset, model=tiny_vit(), samples=3)
    assert [tuple(b["pixel_values"].shape) for b in data.batches] == [(2, 3, 32, 32), (1, 3, 32, 32)]
    assert data.notes == ("not inputs of the model, left out: label",)


def test_data_sets_of_model_inputs_are_shuffled_and_keep_their_labels():
    classes, model = [number // 20 for number in range(60)], CASES["vit_classifier"].build()
    pixels = torch.arange(60.0).view(60, 1, 1, 1).expand(-1, 3, 16, 16)
    columns = {"pixel_values": pixels.numpy(), "labels": classes, "file": [f"{c}.png" for c in classes]}
    dataset = datasets.Dataset.from_dict(columns)
    found = {}
    for purpose in ("calibration", "evaluation"):
        for source in (dataset, dataset.with_format("torch")):
            data = read(source, model=model, samples=20, batch_size=8, purpose=purpose)
            rows = torch.cat([batch["pixel_values"] for batch in data.batches])[:, 0, 0, 0].long()
            labels = torch.cat([batch["labels"] for batch in data.batches])
            assert torch.equal(labels, rows // 20) and set(labels.tolist()) == {0, 1, 2}
            assert [len(batch["labels"]) for batch in data.batches] == [8, 8, 4]
            assert data.notes == ("not inputs of the model, left out: file",)
            found[purpose] = set(rows.tolist())
    assert len(found["calibration"] | found["evaluation"]) == 40


def test_labels_of_a_data_set_of_sounds_become_the_decoders_inputs():
    model = tiny_whisper()
    rows = [
        {"input_features": torch.randn(16, 100).numpy(), "labels": [5 + number] * (3 + number) + [2]}
        for number in range(4)
    ]
    data = read(datasets.Dataset.from_list(rows), model=model, samples=4)
    one_by_one = [batch for row in rows for batch in read([row], model=model).batches]
    expected = {batch["labels"][0, 0].item(): batch["decoder_input_ids"][0] for batch in one_by_one}
    for batch in data.batches:
        blocks = [block.module for block in bind(model).stack("decoder").blocks]
        assert len(capture(model, blocks, [batch]).calls) == 1
        for labels, ids in zip(batch["labels"], batch["decoder_input_ids"], strict=True):
            real = (labels != -100).sum()
            assert torch.equal(ids[:real], expected[labels[0].item()])
    ragged = datasets.Dataset.from_dict({"input_features": [[[0.0] * 100] * 16, [[0.0] * 90] * 16]})
    with pytest.raises(CalibrationError, match=r"'input_features' has rows of different shapes.*pad them"):
        read(ragged, model=model)


def test_a_transform_of_a_data_set_may_make_model_inputs():
    model, processor = CASES["vit_classifier"].build(), ViTImageProcessorPil(size={"height": 16, "width": 16})
    images = datasets.Dataset.from_dict({"image": pictures(5), "label": list(range(5))})
    images = images.cast_column("image", datasets.Image())

    def preprocess(rows):
        made = processor([image.convert("RGB") for image in rows["image"]], return_tensors="pt")
        return {"pixel_values": made["pixel_values"], "labels": rows["label"]}

    data = read(images.with_transform(preprocess), model=model, samples=5)
    expected = processor(pictures(5), return_tensors="pt")["pixel_values"]
    rows = [(pixels, label) for b in data.batches for pixels, label in zip(b["pixel_values"], b["labels"], strict=True)]
    assert {label.item() for _, label in rows} == set(range(5))
    for pixels, label in rows:
        torch.testing.assert_close(pixels, expected[label])

    stream = images.to_iterable_dataset().map(
        lambda row: {"pixel_values": processor(row["image"])["pixel_values"][0], "labels": row["label"]},
        remove_columns=["image", "label"],
    )
    data = read(stream, model=model, samples=5)
    assert torch.cat([batch["labels"] for batch in data.batches]).tolist() == list(range(5))

    without = images.with_transform(lambda rows: {"pixels": rows["label"]})
    with pytest.raises(CalibrationError, match=r"rows have pixels and no column 'image'.*transform"):
        read(without, model=model, tokenizer=processor)


def streamed(rows: datasets.Dataset) -> datasets.IterableDataset:
    """The rows as a stream that no longer knows its columns, as every mapped one does."""
    stream = rows.to_iterable_dataset().map(lambda row: row)
    assert stream.column_names is None and stream.features is None
    return stream


def test_a_mapped_stream_is_read_by_what_its_first_row_holds():
    images = datasets.Dataset.from_dict({"label": [0] * 4, "picture": pictures(4)})
    images = images.cast_column("picture", datasets.Image())
    data = read(streamed(images), model=tiny_vit(), tokenizer=image_processor(), samples=4)
    expected = image_processor()(pictures(4), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(torch.cat([b["pixel_values"] for b in data.batches]), expected)
    sounds = [{"array": [0.1] * 4000, "sampling_rate": 16000}] * 3
    heard = read(
        streamed(datasets.Dataset.from_dict({"clip": sounds})), model=tiny_whisper(), tokenizer=extractor(), samples=3
    )
    assert sum(len(b["input_features"]) for b in heard.batches) == 3 and not heard.notes
    tensors = torch.randn(5, 3, 32, 32)
    ready = read(streamed(datasets.Dataset.from_dict({"pixel_values": tensors.tolist()})), model=tiny_vit())
    torch.testing.assert_close(torch.cat([b["pixel_values"] for b in ready.batches]), tensors)
    with pytest.raises(CalibrationError, match="a data set is read as text"):
        read(streamed(datasets.Dataset.from_dict({"text": ["a"]})), model=tiny_vit(), tokenizer=image_processor())


def test_a_folder_of_images_is_read_by_the_data_recipe_that_is_advised(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, picture in enumerate(pictures(4)):
        picture.save(folder / f"{number}.png")
    with pytest.raises(CalibrationError, match=rf"{folder} is a folder.*dataset: {folder}.*kind: image"):
        read(str(folder), model=tiny_vit(), tokenizer=image_processor())
    recipe = tmp_path / "photos.yaml"
    recipe.write_text(f"dataset: {folder}\nkind: image\n")
    data = read(str(recipe), model=tiny_vit(), tokenizer=image_processor(), samples=4)
    assert sum(len(batch["pixel_values"]) for batch in data.batches) == 4


def test_lines_that_name_sounds_are_not_called_text(tmp_path):
    lines = tmp_path / "speech.jsonl"
    lines.write_text('{"audio": "a.wav", "text": "Good morning."}\n')
    with pytest.raises(CalibrationError, match=r"speech.jsonl is read as text.*reads audio.*kind: audio.*a folder"):
        read(str(lines), model=tiny_whisper(), tokenizer=extractor())


def test_a_text_model_needs_no_eyes():
    with pytest.raises(CalibrationError, match="mini-imagenet"):
        read(["Some text."], model=tiny_vit(), tokenizer=tiny_tokenizer())
    with pytest.raises(CalibrationError, match="'mini-imagenet' is image"):
        read("mini-imagenet", model=tiny_bert(), tokenizer=encoder_tokenizer())
