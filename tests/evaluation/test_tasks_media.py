"""Tasks about images and sounds, from files too, against asking the model by hand."""

from __future__ import annotations

import json
import wave
import weakref

import datasets
import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from tiny import tiny_tokenizer
from tiny_readers import tiny_vit, tiny_whisper
from transformers import (
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Processor,
    WhisperFeatureExtractor,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_shrink.errors import CalibrationError
from hf_shrink.evaluation import evaluate_model
from hf_shrink.evaluation.media import read_images
from hf_shrink.evaluation.recipes import TaskRecipe


def value(result, name):
    return result["model"][name]["value"]


def test_images_of_files_and_folders(tmp_path):
    config = tiny_vit().config
    config.update({"id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}, "initializer_range": 0.3})
    torch.manual_seed(0)
    model = ViTForImageClassification(config).eval()
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    rows, rng = [], np.random.default_rng(0)
    for i, label in enumerate(["cat", "dog", "cat"]):
        path = tmp_path / "all" / label / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8))
        image.save(path)
        with torch.no_grad():
            choice = int(model(**processor(image, return_tensors="pt")).logits.argmax())
        rows.append({"image": f"all/{label}/{i}.png", "label": label, "right": choice == (label == "dog")})
    expected = np.mean([row["right"] for row in rows])
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert value(evaluate_model(model, tmp_path / "rows.jsonl", tokenizer=processor), "accuracy") == pytest.approx(
        expected
    )
    assert value(evaluate_model(model, tmp_path / "all", tokenizer=processor), "accuracy") == pytest.approx(expected)
    with pytest.raises(CalibrationError, match="pass its processor"):
        evaluate_model(model, tmp_path / "rows.jsonl")


def test_images_of_a_data_set_are_decoded_when_they_are_looked_at(monkeypatch):
    config = tiny_vit().config
    config.update({"id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}, "initializer_range": 0.3})
    torch.manual_seed(0)
    model = ViTForImageClassification(config).eval()
    processor, rng = ViTImageProcessorPil(size={"height": 32, "width": 32}), np.random.default_rng(0)
    rows = [
        {"image": Image.fromarray(rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)), "label": i % 2}
        for i in range(7)
    ]
    recipe = TaskRecipe("mine", "classification", batch_size=2)
    expected = evaluate_model(model, rows, tokenizer=processor, spec=recipe)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    table = datasets.Dataset.from_list(rows, features=features)
    decode, decoded, most = datasets.Image.decode_example, [], []

    def watched(*given, **named):
        image = decode(*given, **named)
        decoded.append(weakref.ref(image))
        most.append(sum(one() is not None for one in decoded))
        return image

    monkeypatch.setattr(datasets.Image, "decode_example", watched)
    found = evaluate_model(model, table, tokenizer=processor, spec=recipe)
    assert found["model"] == expected["model"] and value(found, "accuracy") < 1
    assert len(decoded) == 7 and max(most) <= 2, "all images are held at once"
    assert isinstance(table[0]["image"], Image.Image), "the user's own data set stays as it is"
    with pytest.raises(CalibrationError, match="cannot read an image of the data"):
        evaluate_model(model, [{"image": {"bytes": b"no image"}, "label": 0}], tokenizer=processor, spec=recipe)


def vision(names, channels=3):
    """A classifier of images, its processor, and what it makes of a PIL image."""
    config = tiny_vit().config
    by_id = dict(enumerate(names))
    config.update({"id2label": by_id, "label2id": {name: i for i, name in by_id.items()}, "initializer_range": 0.3})
    config.num_channels = channels
    torch.manual_seed(0)
    model = ViTForImageClassification(config).eval()
    size, half = {"height": 32, "width": 32}, [0.5] * channels
    processor = ViTImageProcessorPil(size=size, image_mean=half, image_std=half)

    def choice(image):
        with torch.no_grad():
            return names[int(model(**processor(image, return_tensors="pt")).logits.argmax())]

    return model, processor, choice


def pictures(count, mode="RGB"):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)).convert(mode) for i in range(count)]


@pytest.mark.parametrize("names", [("train", "test-tube", "dev"), ("0", "1", "10", "2")], ids=["words", "numbers"])
def test_names_of_folders_and_files_decide_nothing_but_the_class(names, tmp_path):
    classes = names if "train" in names else [f"LABEL_{i}" for i in range(11)]
    model, processor, choice = vision(classes)
    right = []
    for i, image in enumerate(pictures(8)):
        name = names[i % len(names)]
        path = tmp_path / "set" / name / f"{i}_{('val', 'test', 'train')[i % 3]}_eval-dev.PNG"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        right.append(choice(image) in (name, f"LABEL_{name}"))
    (tmp_path / "set" / "train-notes.txt").write_text("not an image")
    (tmp_path / "set" / names[0] / "._0.png").write_text("what a file system leaves")
    result = evaluate_model(model, tmp_path / "set", tokenizer=processor)
    assert result["sequences"] == 8 and value(result, "accuracy") == pytest.approx(np.mean(right))


def test_folders_that_are_no_classes_are_refused(tmp_path):
    model, processor, _ = vision(("cat", "dog"))

    def refused(message):
        with pytest.raises(CalibrationError, match=message):
            evaluate_model(model, tmp_path, tokenizer=processor)

    refused("no image was found")
    for split in ("train", "test"):
        (tmp_path / split / "cat").mkdir(parents=True)
        pictures(1)[0].save(tmp_path / split / "cat" / "0.png")
    refused(f"give the folder that holds the classes, such as {tmp_path}/test or {tmp_path}/train")
    pictures(1)[0].save(tmp_path / "0.png")
    refused("0.png is in no folder of a class")
    (tmp_path / "metadata.csv").write_text("file_name,label\n0.png,cat\n")
    refused("has a metadata.csv, which is not read with a folder")


def test_images_of_one_channel(tmp_path):
    model, processor, choice = vision(("cat", "dog", "cow"), channels=1)
    rows = []
    for i, image in enumerate(pictures(4, "L")):
        image.save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "label": choice(image)})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert value(evaluate_model(model, tmp_path / "rows.jsonl", tokenizer=processor), "accuracy") == 1
    colour = [{"image": image, "label": choice(image.convert("L"))} for image in pictures(3)]
    assert value(evaluate_model(model, colour, tokenizer=processor), "accuracy") == 1
    four, processor, _ = vision(("cat", "dog"), channels=4)
    with pytest.raises(CalibrationError, match="reads 4 channels"):
        evaluate_model(four, [{"image": pictures(1)[0], "label": "cat"}], tokenizer=processor)


def test_images_of_files_stand_upright(tmp_path):
    image, exif = pictures(1)[0], Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    seen = []
    read_images([tmp_path / "turned.png"], lambda images, **_: seen.extend(images), "RGB")
    assert np.array_equal(np.asarray(seen[0]), np.asarray(image.transpose(Image.Transpose.ROTATE_270)))


@pytest.mark.parametrize(("new", "written"), [(5, 5), (128, 20)], ids=["few", "more than there are positions"])
def test_speech_of_wave_files(new, written, tmp_path):
    model, tokenizer = tiny_whisper(), tiny_tokenizer()
    extractor = WhisperFeatureExtractor(feature_size=16, chunk_length=1, sampling_rate=16000)

    class Processor:
        feature_extractor = extractor

    Processor.tokenizer = tokenizer
    rng, rows = np.random.default_rng(0), []
    for i in range(3):
        samples = (rng.normal(size=8000 + 100 * i) * 3000).astype("<i2")
        with wave.open(str(tmp_path / f"{i}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(16000)
            file.writeframes(samples.tobytes())
        features = extractor(samples.astype(np.float32) / 2**15, sampling_rate=16000, return_tensors="pt")
        ids = model.generate(features.input_features, max_new_tokens=written, do_sample=False)
        rows.append({"audio": f"{i}.wav", "text": tokenizer.decode(ids[0], skip_special_tokens=True)})
    path = tmp_path / "speech.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    recipe = TaskRecipe("mine", "transcription", options={"new": new})
    result = evaluate_model(model, path, tokenizer=Processor(), spec=recipe)
    assert value(result, "wer") == 0 and result["sequences"] == 3
    long = [{"audio": {"array": np.zeros(16001, np.float32), "sampling_rate": 16000}, "text": "a"}]
    with pytest.raises(CalibrationError, match=r"1\.0 seconds long"):
        evaluate_model(model, long, tokenizer=Processor(), spec=recipe)
    rows[0]["text"] += " and more words"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert value(evaluate_model(model, path, tokenizer=Processor(), spec=recipe), "wer") > 0


def test_speech_by_frames(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({c: i for i, c in enumerate(["<pad>", "|", *"abcdefgh"])}))
    tokenizer = Wav2Vec2CTCTokenizer(tmp_path / "vocab.json", unk_token="<pad>", bos_token="<pad>", eos_token="<pad>")
    processor = Wav2Vec2Processor(Wav2Vec2FeatureExtractor(), tokenizer)
    config = Wav2Vec2Config(
        vocab_size=10,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        conv_dim=(16, 16),
        conv_kernel=(10, 8),
        conv_stride=(5, 4),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    model, rng, rows = Wav2Vec2ForCTC(config).eval(), np.random.default_rng(0), []
    for length in (400, 700, 550):  # of different lengths: padding would change what a model without a mask hears
        sound = rng.normal(size=length).astype(np.float32)
        with torch.no_grad():
            logits = model(processor(sound, sampling_rate=16000, return_tensors="pt").input_values).logits
        rows.append({"audio": {"array": sound, "sampling_rate": 16000}, "text": tokenizer.decode(logits[0].argmax(-1))})
    result = evaluate_model(model, rows, tokenizer=processor)
    assert result["task"] == "transcription" and value(result, "wer") == 0
    assert any(row["text"] for row in rows)
