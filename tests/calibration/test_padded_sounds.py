"""Sounds of different lengths in one batch: what a model makes of the padding behind them is not counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_readers import tiny_whisper
from torch import Tensor, nn
from transformers import (
    Speech2TextConfig,
    Speech2TextForConditionalGeneration,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    Wav2Vec2Model,
)

from hf_shrink.architectures import bind
from hf_shrink.calibration.capture import capture
from hf_shrink.calibration.padding import token_mask
from hf_shrink.calibration.predictions import predictions_of
from hf_shrink.calibration.walk import StackWalk
from hf_shrink.evaluation.scored import forward
from hf_shrink.progress import quiet
from hf_shrink.pruning.items import Items
from hf_shrink.pruning.measure import MeasuredModel
from hf_shrink.search.fisher import output_gradients
from hf_shrink.tuning.teacher import Teacher

SAMPLES = (900, 410)
FRAMES = (89, 40)  # of these, with the convolutions below


def hears_samples(kind: Any = Wav2Vec2ForCTC, **changes: Any) -> Any:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    convolutions = {"conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (5, 2), "feat_extract_norm": "layer"}
    positions = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
    torch.manual_seed(0)
    config = Wav2Vec2Config(**sizes, **convolutions, **positions, vocab_size=12, **changes)
    return kind(config).eval()


def padded(key: str = "input_values", lengths: tuple[int, ...] = SAMPLES, width: tuple[int, ...] = ()) -> Any:
    values = torch.randn(len(lengths), lengths[0], *width, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(lengths[0]) < torch.tensor(lengths)[:, None]
    return {key: values * mask.view(*mask.shape, *[1] * len(width)), "attention_mask": mask.long()}


def alone() -> list[dict[str, Tensor]]:
    batch = padded()
    return [{n: v[row : row + 1, :count] for n, v in batch.items()} for row, count in enumerate(SAMPLES)]


def linears(block: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def test_second_moments_of_a_padded_batch_are_those_of_its_sounds() -> None:
    model = hears_samples()
    blocks = list(model.wav2vec2.encoder.layers)
    both, single = (StackWalk(model, blocks, batches) for batches in ([padded()], alone()))
    assert both.tokens == single.tokens == sum(FRAMES)
    for walk in (both, single):
        walk.advance()
    found, expected = (walk.statistics(linears(blocks[1])) for walk in (both, single))
    assert len(found) == 6
    for path, statistics in found.items():
        assert statistics.tokens == sum(FRAMES)
        torch.testing.assert_close(statistics.hessian, expected[path].hessian, rtol=1e-3, atol=1e-4)


def test_predictions_on_padding_are_not_compared() -> None:
    model, batch = hears_samples(), padded()
    with torch.no_grad():
        expected = torch.cat([model(**row).logits[0] for row in alone()])
        predictions = predictions_of(model(**batch), batch, "other", model)
        scored = forward("other", batch, model)
    torch.testing.assert_close(predictions.values, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(scored.logits[scored.positions], expected, rtol=1e-3, atol=1e-4)
    teacher = Teacher(model, [batch, *alone()], quiet)
    other = hears_samples()
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
        other.wav2vec2.encoder.layers[1].feed_forward.output_dense.weight.mul_(2)
        losses = [float(teacher.loss(other, number)) for number in range(3)]
    mean = sum(loss * frames for loss, frames in zip(losses[1:], FRAMES, strict=True)) / sum(FRAMES)
    assert losses[0] == pytest.approx(mean, rel=0.02)


def test_scores_of_blocks_and_gradients_are_those_of_the_sounds() -> None:
    model = hears_samples()
    bound = bind(model)
    problems = [MeasuredModel(model, Items(model, bound), batches, 0, quiet) for batches in ([padded()], alone())]
    found, expected = (problem.influences(()) for problem in problems)
    assert found == pytest.approx(expected, rel=1e-2) and len(found) == 2
    paths = {path: model.get_submodule(path) for block in bound.blocks for path in block.roles}
    blocks = [block.module for block in bound.blocks]
    both, single = (output_gradients(model, blocks, paths, b, 0, quiet) for b in ([padded()], alone()))
    assert both.predictions == single.predictions == sum(FRAMES)
    for gradients in both.outputs.values():
        assert int((gradients.tokens[0] != 0).sum()) == sum(FRAMES)


def test_an_adapter_makes_fewer_frames_behind_the_blocks() -> None:
    model, batch = hears_samples(Wav2Vec2Model, add_adapter=True, num_adapter_layers=1), padded()
    blocks = list(model.encoder.layers)
    (inside,) = capture(model, blocks, [batch]).masks
    assert inside is not None and inside.sum(1).tolist() == list(FRAMES)
    with torch.no_grad():
        outputs = model(**batch)
    behind = token_mask(batch, outputs.last_hidden_state.shape[:2], model)
    assert behind is not None and behind.sum(1).tolist() == [45, 20]
    assert len(predictions_of(outputs, batch, "other", model).values) == 65


def test_an_encoder_of_frames_and_what_its_decoder_reads_of_it() -> None:
    config = Speech2TextConfig(
        vocab_size=40,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        input_feat_per_channel=8,
        conv_channels=16,
        max_source_positions=80,
        max_target_positions=20,
    )
    torch.manual_seed(0)
    model = Speech2TextForConditionalGeneration(config).eval()
    batch = {**padded("input_features", (60, 24), (8,)), "decoder_input_ids": torch.randint(3, 40, (2, 5))}
    frames = 15 + 6
    encoder, decoder = list(model.model.encoder.layers), list(model.model.decoder.layers)
    heard = StackWalk(model, encoder, [batch]).statistics(linears(encoder[0]))
    assert {statistics.tokens for statistics in heard.values()} == {frames}
    written = StackWalk(model, decoder, [batch]).statistics(linears(decoder[0]))
    assert written["encoder_attn.k_proj"].tokens == frames and written["encoder_attn.q_proj"].tokens == 10


def test_a_model_that_does_not_say_what_becomes_of_its_mask_counts_all() -> None:
    model = tiny_whisper()
    batch = {"input_features": torch.randn(2, 16, 100), "attention_mask": padded(lengths=(100, 40))["attention_mask"]}
    walk = StackWalk(model, list(model.model.encoder.layers), [{**batch, "decoder_input_ids": torch.ones(2, 3).long()}])
    assert walk.tokens == 100 and walk.mask(0) is None
