"""The small pieces of measuring: which samples, which predictions, how far apart."""

from __future__ import annotations

import pytest
import torch

from hf_shrink.calibration.predictions import Predictions, divergence, keep, predictions_of
from hf_shrink.errors import ArchitectureError, CalibrationError
from hf_shrink.pruning import samples


def batches() -> list[dict[str, torch.Tensor]]:
    ids = torch.arange(10 * 8).view(10, 8)
    return [{"input_ids": ids[:4]}, {"input_ids": ids[4:]}]


def rows(chosen: list[dict[str, torch.Tensor]]) -> list[int]:
    return [int(row[0]) // 8 for batch in chosen for row in batch["input_ids"]]


def test_all_samples_are_used_without_a_limit() -> None:
    assert rows(samples.choose(batches(), None, 0)) == list(range(10))


def test_as_many_samples_as_the_tokens_need_chosen_by_seed() -> None:
    first, again, other = (rows(samples.choose(batches(), 30, seed)) for seed in (0, 0, 1))
    assert len(first) == 4 and first == sorted(set(first))
    assert first == again != other
    assert len(rows(samples.choose(batches(), 1, 0))) == 1


def test_batches_are_cut_to_few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "AT_ONCE", 17)
    chosen = samples.choose(batches(), None, 0)
    assert [len(batch["input_ids"]) for batch in chosen] == [2, 2, 2, 2, 2]
    assert rows(chosen) == list(range(10))


def test_a_batch_whose_inputs_differ_in_rows_stays_whole() -> None:
    uneven = {"input_ids": torch.zeros(3, 8, dtype=torch.long), "pixel_values": torch.zeros(2, 3, 4, 4)}
    [only] = samples.choose([uneven], 4, 0)
    assert only["pixel_values"] is uneven["pixel_values"]


def test_padding_is_left_out_of_predictions() -> None:
    logits = torch.randn(2, 3, 5)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    found = predictions_of({"logits": logits}, {"attention_mask": mask})
    assert found.distribution
    assert torch.equal(found.values, torch.stack([logits[0, 0], logits[0, 1], logits[1, 0]]))


def test_an_encoders_mask_does_not_hide_the_decoders_tokens() -> None:
    mask = torch.tensor([[1, 0, 0]])
    batch = {"attention_mask": mask, "decoder_input_ids": torch.zeros(1, 3, dtype=torch.long)}
    assert len(predictions_of({"logits": torch.randn(1, 3, 5)}, batch).values) == 3


def test_spans_embeddings_and_nothing() -> None:
    spans = predictions_of({"start_logits": torch.randn(2, 7), "end_logits": torch.randn(2, 7)}, {})
    assert spans.distribution and spans.values.shape == (4, 7)
    towers = predictions_of({"image_embeds": torch.randn(2, 6), "text_embeds": torch.randn(3, 6)}, {})
    assert not towers.distribution and towers.values.shape == (5, 6)
    with pytest.raises(ArchitectureError, match="block_influence"):
        predictions_of({"loss": torch.zeros(())}, {})


def test_divergence_sums_kl_over_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.randn(30, 11) * 3, torch.randn(30, 11) * 3
    p, q = a.double().softmax(-1), b.double().softmax(-1)
    expected = float((p * (p / q).log()).sum())
    dense = keep(Predictions(a, True))
    assert divergence(dense, Predictions(b, True)) == pytest.approx(expected, rel=1e-5)
    monkeypatch.setattr("hf_shrink.calibration.predictions.CHUNK", 40)
    assert divergence(dense, Predictions(b, True)) == pytest.approx(expected, rel=1e-5)
    assert divergence(dense, Predictions(a, True)) == pytest.approx(0, abs=1e-5)


def test_states_are_compared_by_angle() -> None:
    a = torch.randn(6, 4)
    assert divergence(keep(Predictions(a, False)), Predictions(-2 * a, False)) == pytest.approx(12, rel=1e-5)


def test_scores_are_compared_by_their_error() -> None:
    """The angle between two numbers is their sign."""
    dense, pruned = (predictions_of({"logits": torch.tensor(found)[:, None]}, {}) for found in ([1.0, 2.0], [4.0, 2.0]))
    assert divergence(keep(dense), pruned) == pytest.approx(4.5)
    assert divergence(keep(dense.thinned(1)), pruned.thinned(1)) == pytest.approx(4.5)


def test_not_finite_predictions_are_an_error() -> None:
    bad = torch.full((2, 3), float("nan"))
    for distribution in (True, False):
        with pytest.raises(CalibrationError, match="NaN or Inf"):
            divergence(keep(Predictions(torch.zeros(2, 3), distribution)), Predictions(bad, distribution))


def test_thinning_spreads_over_all_rows() -> None:
    found = Predictions(torch.arange(100.0)[:, None], False).thinned(5)
    assert found.values[:, 0].tolist() == [0, 24, 49, 74, 99]


@pytest.mark.parametrize("shape", [(4, 3), (2, 5, 3)])
def test_of_several_classes_each_is_a_choice_of_its_own(shape: tuple[int, ...]) -> None:
    dense, pruned = torch.randn(shape) * 3, torch.randn(shape) * 3
    found = [predictions_of({"logits": logits}, {}, "several") for logits in (dense, pruned)]
    p, q = dense.double().sigmoid(), pruned.double().sigmoid()
    expected = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum()
    assert divergence(keep(found[0]), found[1]) == pytest.approx(float(expected), rel=1e-5)


def test_several_numbers_are_compared_by_their_error() -> None:
    dense, pruned = torch.randn(5, 3), torch.randn(5, 3)
    found = [predictions_of({"logits": logits}, {}, "numbers") for logits in (dense, pruned)]
    expected = (dense - pruned).double().square().sum() / 2
    assert divergence(keep(found[0]), found[1]) == pytest.approx(float(expected), rel=1e-5)
