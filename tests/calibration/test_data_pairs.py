"""Images with text as data for a vision-language model: rows through its processor, and batches that the user made."""

from __future__ import annotations

import copy
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conformance.cases import CASES
from image_batches import IMAGE, llava_batch, qwen_batch
from PIL import Image
from tiny import TEXT, VOCABULARY, tiny_tokenizer
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from hf_shrink import shrink, shrink_checkpoint
from hf_shrink.calibration.data import CalibrationData, calibration_batches
from hf_shrink.calibration.inputs import placeholder_ids, vocabulary_size
from hf_shrink.errors import CalibrationError
from hf_shrink.recipe import CalibrationSpec

MARK = VOCABULARY  # the id of <image>, behind the tokenizer's own entries
CHAT = (
    "{% for m in messages %}{% for c in m.content %}"
    "{{ '<image>' if c.type == 'image' else ' ask: ' + c.text }}"
    "{% endfor %}{% endfor %}"
)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def tiny_llava() -> LlavaForConditionalGeneration:
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 48}
    text = {**layers, "model_type": "llama", "vocab_size": VOCABULARY + 1, "max_position_embeddings": 128}
    vision = {**layers, "model_type": "clip_vision_model", "image_size": 16, "patch_size": 4}
    special = {"image_token_index": MARK, "image_seq_length": 16}
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, **special)).eval()


def processor(chat_template: str | None = None) -> LlavaProcessor:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    pixels = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    settings = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return LlavaProcessor(pixels, tokenizer, chat_template=chat_template, **settings)


def rows(count: int = 6, **columns: list[object]) -> datasets.Dataset:
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(generator.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)) for i in range(count)]
    return datasets.Dataset.from_dict({"image": pictures, **columns}).cast_column("image", datasets.Image())


def texts(count: int = 6) -> list[object]:
    return [f"A child counts the stones of the shore, {' and walks' * i}." for i in range(count)]


def read(source: object, model: torch.nn.Module, samples: int = 5, **options: object) -> CalibrationData:
    spec = CalibrationSpec(samples=samples, length=options.pop("length", 64), batch_size=2)
    return calibration_batches(spec, source=source, model=model, **options)


def test_each_row_is_its_image_and_its_text() -> None:
    model, whole = tiny_llava(), processor()
    data = read(rows(text=texts()), model, tokenizer=whole)
    assert len(data.batches) == 5 and data.details["samples"] == 5 and not data.notes
    lengths = set()
    for batch in data.batches:
        assert set(batch) == {"input_ids", "attention_mask", "pixel_values"}
        assert batch["pixel_values"].shape == (1, 3, 16, 16)
        assert int((batch["input_ids"] == MARK).sum()) == 16
        assert "counts the stones" in whole.tokenizer.decode(batch["input_ids"][0])
        lengths.add(batch["input_ids"].shape[1])
        model(**batch)
    assert len(lengths) > 1
    again = read(rows(text=texts()), model, tokenizer=whole)
    assert all(torch.equal(a[name], b[name]) for a, b in zip(data.batches, again.batches, strict=True) for name in a)


def test_a_mapped_stream_keeps_its_images() -> None:
    model, whole, pairs = tiny_llava(), processor(), rows(text=texts()).rename_column("image", "picture")
    stream = pairs.to_iterable_dataset().map(lambda row: row)
    assert stream.column_names is None
    data, expected = (read(source, model, tokenizer=whole, samples=6) for source in (stream, pairs))
    assert data.description == expected.description == "6 images with text of a data set"
    shown = {batch["pixel_values"].sum().item() for batch in data.batches}  # the data set itself comes shuffled
    assert shown == {batch["pixel_values"].sum().item() for batch in expected.batches} and len(shown) == 6


def test_a_chat_template_says_where_the_image_goes() -> None:
    whole = processor(CHAT)
    data = read(rows(text=texts()), tiny_llava(), tokenizer=whole)
    assert "<image> ask: A child" in whole.tokenizer.decode(data.batches[0]["input_ids"][0])


def test_captions_images_alone_and_long_texts() -> None:
    model, whole = tiny_llava(), processor()
    several = read(rows(caption=[["A stone.", "The sea."]] * 6), model, tokenizer=whole, samples=1)
    assert whole.tokenizer.decode(several.batches[0]["input_ids"][0]).endswith("\nA stone.")
    alone = read(rows(), model, tokenizer=whole, samples=1)
    assert int((alone.batches[0]["input_ids"] == MARK).sum()) == 16
    long = read(rows(text=[TEXT] * 6), model, tokenizer=whole, samples=1, length=10)
    assert 16 + 10 <= long.batches[0]["input_ids"].shape[1] <= 16 + 13


def test_excluded_texts_are_left_out_and_missing_rows_are_said() -> None:
    sea = "The sea was calm that morning, and the boats went out before anybody had woken up."
    data = read(rows(text=[*texts(5), sea]), tiny_llava(), tokenizer=processor(), samples=6, exclude=[sea])
    assert len(data.batches) == 5 and data.details["dropped_overlap"] == 1
    assert data.notes == ("a data set has 5 images instead of 6",)


def test_what_cannot_be_read_is_said() -> None:
    model, whole = tiny_llava(), processor()
    with pytest.raises(CalibrationError, match="takes the model's processor"):
        read(rows(text=texts()), model, tokenizer=whole.tokenizer)
    with pytest.raises(CalibrationError, match="is not text"):
        read(rows(messages=[[{"role": "user", "content": "a stone"}]] * 6), model, tokenizer=whole)
    with pytest.raises(CalibrationError, match="no rows"):
        read(rows(text=texts()).select([]), model, tokenizer=whole)
    unmarked = processor()
    unmarked.image_token = None
    with pytest.raises(CalibrationError, match="neither a chat template nor an image_token"):
        read(rows(text=texts()), model, tokenizer=unmarked)


def test_text_alone_is_read_as_for_any_language_model() -> None:
    model, whole = tiny_llava(), processor()
    data = read([TEXT] * 4, model, tokenizer=whole, samples=2, length=16)
    assert data.batches[0]["input_ids"].shape == (2, 16) and "pixel_values" not in data.batches[0]
    own = read("self", model, tokenizer=whole, samples=4, length=16)
    assert not any((batch["input_ids"] == MARK).any() for batch in own.batches)


def test_a_folder_and_a_file_of_images_with_text(tmp_path: Path) -> None:
    model, whole = tiny_llava(), processor(CHAT)
    model.save_pretrained(tmp_path / "dense")
    whole.save_pretrained(tmp_path / "dense")
    rows(12, text=texts(12)).to_parquet(tmp_path / "pairs.parquet")
    recipe = {
        "calibration": {"samples": 3, "length": 32},
        "steps": [{"quantize": {"method": "gptq", "scheme": "W8A16", "overrides": {"re:.*vision_tower.*": {}}}}],
        "evaluation": {"data": str(tmp_path / "pairs.parquet"), "samples": 3, "length": 32},
    }
    report = shrink_checkpoint(
        tmp_path / "dense",
        tmp_path / "small",
        recipe,
        tokenizer=whole,
        calibration=str(tmp_path / "pairs.parquet"),
        progress=False,
    )
    assert report.portable and "images with text of pairs.parquet" in report.calibration["description"]
    assert report.evaluation["compressed"]["kl_divergence"]["value"] > 0
    assert report.completions and all(isinstance(texts["dense"], str) for texts in report.completions)
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / "small")
    assert loaded.model.vision_tower.encoder.layers[0].mlp.fc1.scheme.bits == 8


def test_given_batches_stay_whole_where_images_and_rows_do_not_go_together() -> None:
    llava, qwen = CASES["llava"].build(), CASES["qwen2_vl"].build()
    even = read([llava_batch(rows=5)], llava, samples=4)
    assert [len(batch["input_ids"]) for batch in even.batches] == [2, 2] and even.details["samples"] == 4
    uneven = llava_batch(rows=3)
    uneven["input_ids"][0, 2:18] = 7  # no image in the first row; the second has two
    uneven["input_ids"] = torch.cat([uneven["input_ids"], torch.full((3, 16), 8)], dim=1)
    uneven["input_ids"][1, -16:] = IMAGE
    uneven["attention_mask"] = torch.ones_like(uneven["input_ids"])
    (kept,) = read([uneven], llava).batches
    assert all(torch.equal(kept[name], uneven[name]) for name in uneven)
    llava(**kept)
    patches = [qwen_batch(seed=seed) for seed in range(4)]
    data = read(patches, qwen, samples=3)
    assert len(data.batches) == 3 and data.details["samples"] == 3
    assert data.notes == ("only the first 3 rows were used (calibration.samples)",)


def test_rows_without_a_batch_dimension_and_without_token_types() -> None:
    model, batch = CASES["qwen2_vl"].build(), qwen_batch(((4, 4), (2, 6)))
    row = {name: value if name in ("pixel_values", "image_grid_thw") else value[0] for name, value in batch.items()}
    del row["mm_token_type_ids"]
    (kept,) = read([row], model).batches
    assert kept.keys() == batch.keys()
    assert all(torch.equal(kept[name], value) for name, value in batch.items())
    llava = llava_batch(rows=1)
    (kept,) = read([{name: value[0] for name, value in llava.items()}], CASES["llava"].build()).batches
    assert all(torch.equal(kept[name], value) for name, value in llava.items())


def test_positions_of_three_axes_are_not_cut_as_rows() -> None:
    model = CASES["qwen2_vl"].build()
    ids = torch.randint(5, 300, (3, 8), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(8).expand(3, 3, 8)
    (kept,) = read([{"input_ids": ids, "position_ids": positions}], model).batches
    assert torch.equal(kept["position_ids"], positions) and len(kept["input_ids"]) == 3
    quantize = {"method": "gptq", "scheme": "W8A16", "group_size": 16}
    shrink(model, {"steps": [{"quantize": quantize}]}, calibration=[kept], progress=False)


def test_the_vocabulary_is_that_of_the_text() -> None:
    model = CASES["llava"].build()
    assert model.config.vision_config.vocab_size == 3
    assert vocabulary_size(model) == 300 and placeholder_ids(model.config) == [IMAGE]
    with pytest.raises(CalibrationError, match="has token 300"):
        read([{"input_ids": torch.full((1, 4), 300)}], model)
