"""Our metrics in `evaluate.evaluator`, for the tasks that transformers still has pipelines for."""

from __future__ import annotations

import datasets
import evaluate
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TEXT
from tiny_readers import encoder_tokenizer, tiny_bert, tiny_vit
from transformers import BertForSequenceClassification, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_shrink import evaluate_model, shrink
from hf_shrink.evaluation.metrics import load_metric

LABELS = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}, "initializer_range": 0.4}


def compressed(model):
    recipe = {"steps": [{"quantize": {"method": "rtn", "scheme": "W8A16", "group_size": 32}}]}
    return shrink(model, {**recipe, "evaluation": {"metrics": []}}, progress=False)


def classifier(cls, config):
    config.update(LABELS)
    torch.manual_seed(0)
    return compressed(cls(config).eval())


def test_texts(tmp_path):
    model, tokenizer = classifier(BertForSequenceClassification, tiny_bert().config), encoder_tokenizer()
    words, rng = TEXT.split()[:18], np.random.default_rng(0)
    rows = {"text": [" ".join(rng.choice(words, size=4)) for _ in range(9)], "label": rng.integers(2, size=9).tolist()}
    data = datasets.Dataset.from_dict(rows)
    found = evaluate.evaluator("text-classification").compute(
        model_or_pipeline=model,
        tokenizer=tokenizer,
        data=data,
        metric=load_metric("accuracy", tmp_path),
        label_mapping=LABELS["label2id"],
        device=-1,
    )
    ours = evaluate_model(model, data, tokenizer=tokenizer, metrics=["accuracy"])
    assert found["accuracy"] == pytest.approx(ours["model"]["accuracy"]["value"])
    assert found["low"] <= found["accuracy"] <= found["high"] and found["samples_per_second"] > 0


def test_images(tmp_path):
    model, rng = classifier(ViTForImageClassification, tiny_vit().config), np.random.default_rng(0)
    model.save_pretrained(tmp_path / "vit")
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path / "vit")
    images = [Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)) for _ in range(6)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    data = datasets.Dataset.from_dict({"image": images, "label": [0, 1, 0, 1, 1, 0]}, features=features)
    found = evaluate.evaluator("image-classification").compute(
        model_or_pipeline=str(tmp_path / "vit"),
        data=data,
        metric=load_metric("f1", tmp_path),
        label_mapping=LABELS["label2id"],
        device=-1,
    )
    ours = evaluate_model(model, data, tokenizer=processor, metrics=["f1"])
    assert found["f1"] == pytest.approx(ours["model"]["f1"]["value"])
