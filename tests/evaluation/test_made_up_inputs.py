"""Inputs that are made up to time a model: every kind of model runs on them, or says that it does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import VOCABULARY
from tiny_readers import tiny_clip, tiny_t5, tiny_whisper
from transformers import (
    ASTConfig,
    ASTForAudioClassification,
    BartConfig,
    BartForSequenceClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    T5EncoderModel,
    VideoMAEConfig,
    VideoMAEForPreTraining,
    VideoMAEForVideoClassification,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
)

from hf_shrink.calibration.data import CalibrationData
from hf_shrink.errors import ArchitectureError
from hf_shrink.evaluation import bench_checkpoint, compare_decode_speed
from hf_shrink.evaluation.costs import add_costs
from hf_shrink.evaluation.made_up import made_up_inputs
from hf_shrink.evaluation.observed import Observed
from hf_shrink.pipeline import measuring
from hf_shrink.recipe import EvaluationSpec
from hf_shrink.report import ShrinkReport
from hf_shrink.reporting.progress import Progress

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}


def waveform_reader() -> PreTrainedModel:
    config = Wav2Vec2Config(
        **SIZES,
        conv_dim=(16, 16, 16),
        conv_kernel=(10, 8, 8),
        conv_stride=(10, 8, 8),
        num_feat_extract_layers=3,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=16,
    )
    return Wav2Vec2ForSequenceClassification(config).eval()


def spectrogram_reader() -> PreTrainedModel:
    config = ASTConfig(**SIZES, num_mel_bins=16, max_length=64, patch_size=8, frequency_stride=8, time_stride=8)
    return ASTForAudioClassification(config).eval()


def classifier_behind_a_decoder(**changes: Any) -> PreTrainedModel:
    config = BartConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=64,
        **changes,
    )
    return BartForSequenceClassification(config).eval()


def video_config() -> VideoMAEConfig:
    small = {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    return VideoMAEConfig(**SIZES, **small, num_frames=4, tubelet_size=2, image_size=16, patch_size=8)


def video_reader() -> PreTrainedModel:
    return VideoMAEForVideoClassification(video_config()).eval()


def half_a_text_writer() -> PreTrainedModel:
    return T5EncoderModel(tiny_t5().config).eval()


def reader_of_any_size() -> PreTrainedModel:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    return ResNetForImageClassification(config).eval()


READERS = (
    *(waveform_reader, spectrogram_reader, classifier_behind_a_decoder, video_reader, half_a_text_writer),
    *(tiny_clip, tiny_t5, tiny_whisper),
)


@pytest.mark.parametrize("build", READERS)
def test_a_forward_pass_takes_what_is_made_up(build: Callable[[], PreTrainedModel]) -> None:
    model = build()
    for batch in (1, 3):
        with torch.no_grad():
            found = model(**made_up_inputs(model, 12, batch))
        assert torch.isfinite(found[0]).all()


@pytest.mark.parametrize("build", READERS)
def test_its_speed_is_measured(build: Callable[[], PreTrainedModel]) -> None:
    model = build()
    speed = compare_decode_speed(model, model, prompt=6, new=3, repeats=1)
    assert speed["unit"] == ("tokens/s" if model.can_generate() else "passes/s")


def test_a_text_that_a_classifier_behind_a_decoder_reads_has_one_end() -> None:
    model = classifier_behind_a_decoder(eos_token_id=7)
    ids = made_up_inputs(model, 60, 16)["input_ids"]
    assert (ids == 7).sum(1).tolist() == [1] * 16 and (ids[:, -1] == 7).all()
    assert ids.min() >= 0 and ids.max() < VOCABULARY


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (reader_of_any_size, "reads pixel_values, and its config does not say of what shape"),
        (lambda: VideoMAEForPreTraining(video_config()).eval(), "does not run on made-up inputs"),  # needs a mask too
    ],
)
def test_what_cannot_be_made_up_is_said(build: Callable[[], PreTrainedModel], message: str, tmp_path: Path) -> None:
    model = build()
    with pytest.raises(ArchitectureError, match=message):
        compare_decode_speed(model, model, repeats=1)
    observed = Observed()
    add_costs(observed, {"seconds"}, {"model": model})
    assert message in observed.missing["seconds"] and not observed.model
    model.save_pretrained(tmp_path)
    with pytest.raises(ArchitectureError, match=message):
        bench_checkpoint(tmp_path, baseline=tmp_path, dense_dtypes=["float32"], memory=False)


def test_an_example_in_place_of_what_is_made_up() -> None:
    model = reader_of_any_size()
    example = {"pixel_values": torch.randn(1, 3, 32, 32)}
    assert compare_decode_speed(model, model, repeats=1, inputs=example)["unit"] == "passes/s"
    with pytest.raises(ValueError, match="channel"):  # an example's own mistake stays what it is
        compare_decode_speed(model, model, repeats=1, inputs={"pixel_values": torch.randn(1, 2, 32, 32)})


def measured(model: PreTrainedModel, data: dict[str, torch.Tensor]) -> ShrinkReport:
    """What `measure` puts into the report of a run that is about to end."""
    report = ShrinkReport()
    record: Any = SimpleNamespace(report=report, tokenizer=None)
    spec = EvaluationSpec(metrics=("top1_agreement", "latency"))
    measuring.measure(model, model, CalibrationData([data], "given"), spec, (None, None), record, Progress(quiet=True))
    assert report.evaluation["compressed"]["top1_agreement"]["value"] == 1
    return report


def test_a_run_is_not_lost_where_speed_cannot_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    report = measured(reader_of_any_size(), {"pixel_values": torch.randn(2, 3, 32, 32)})
    assert "speed" not in report.evaluation
    assert "does not say of what shape" in report.evaluation["skipped"]["latency"]
    assert len(report.notes) == 1 and report.notes[0].startswith("speed was not measured: ResNet")

    def broken(*given: Any, **named: Any) -> Any:
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(measuring, "compare_decode_speed", broken)
    report = measured(video_reader(), {"pixel_values": torch.randn(2, 4, 3, 16, 16)})
    assert report.notes == ["speed was not measured: RuntimeError: out of memory"]
