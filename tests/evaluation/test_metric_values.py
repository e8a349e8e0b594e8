"""The metrics of labels, texts, tags, scores and rankings against plain computations, and through `evaluate` itself."""

from __future__ import annotations

import evaluate
import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import f1_score, ndcg_score

from hf_shrink.evaluation.metrics import NAMES, load_metric, metric_path


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("metrics")


def compute(cache, name, predictions, references, **options):
    result = load_metric(name, cache).compute(predictions=predictions, references=references, **options)
    if result["low"] is not None:
        assert result["low"] <= result[name] <= result["high"]
    return result


def test_every_metric_says_what_it_is(cache):
    for name in NAMES:
        metric = load_metric(name, cache)
        assert metric.name == name and len(metric.reads) == 2 and metric.description
        assert "bootstrap interval" in metric.inputs_description


def test_labels(cache):
    rng = np.random.default_rng(0)
    right = rng.choice([0, 1, 2], size=60, p=[0.7, 0.2, 0.1]).tolist()
    given = [label if rng.random() < 0.7 else int(rng.integers(3)) for label in right]
    accuracy = compute(cache, "accuracy", given, right)
    assert accuracy["accuracy"] == pytest.approx(np.mean(np.array(given) == right))
    assert 0.05 < accuracy["high"] - accuracy["low"] < 0.35
    f1 = compute(cache, "f1", given, right)
    assert f1["f1"] == pytest.approx(f1_score(right, given, average="macro"))
    resampled = [
        f1_score(np.array(right)[i], np.array(given)[i], average="macro")
        for i in (rng.integers(60, size=60) for _ in range(400))
    ]
    assert (f1["low"], f1["high"]) == pytest.approx(np.quantile(resampled, (0.025, 0.975)), abs=0.04)
    names = [f"class {label}" for label in right]
    assert compute(cache, "accuracy", names, names)["accuracy"] == compute(cache, "f1", names, names)["f1"] == 1


def test_flips_do_not_cancel(cache):
    assert compute(cache, "flip_rate", [1, 0, 1, 0], [0, 1, 1, 0])["flip_rate"] == 0.5


def test_texts(cache):
    texts, wanted = ["The cat!", "a dog", "no"], [["cat", "kitten"], ["a big dog"], ["yes"]]
    assert compute(cache, "exact_match", texts, wanted)["exact_match"] == pytest.approx(1 / 3)
    assert compute(cache, "answer_f1", texts, wanted)["answer_f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert compute(cache, "rouge_l", ["a b c d"], ["b x d"])["rouge_l"] == pytest.approx(2 * 2 / 7)
    squad = [{"id": "1", "prediction_text": "Cat"}, {"id": "2", "prediction_text": ""}]
    answers = [{"text": ["a cat"], "answer_start": [0]}, {"text": [], "answer_start": []}]
    right = [{"id": str(i + 1), "answers": answer} for i, answer in enumerate(answers)]
    assert compute(cache, "exact_match", squad, right)["exact_match"] == 1, "no answer is the right one to none"


def test_word_errors_are_counted_over_all_words(cache):
    said = ["the cat sat on the mat", "hello", ""]
    heard = ["The cat sat, on mat", "hello there you", "noise"]
    # One left out of six, two put in to one, one put in where nothing was said.
    assert compute(cache, "wer", heard, said)["wer"] == pytest.approx(4 / 8)


def test_entities_are_right_as_a_whole(cache):
    right = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "O"], ["B-ORG", "B-ORG"]]
    given = [["B-PER", "O", "O", "B-LOC"], ["O", "B-PER"], ["B-ORG", "B-ORG"]]
    # Right: one place, two organisations; found 5, wanted 4.
    assert compute(cache, "entity_f1", given, right)["entity_f1"] == pytest.approx(2 * 3 / (5 + 4))
    assert compute(cache, "entity_f1", [["O"]], [["O"]])["entity_f1"] == 1


@pytest.mark.parametrize("name", ["rank_correlation", "score_agreement"])
def test_rank_correlation_is_scipys_with_ties(cache, name):
    rng = np.random.default_rng(1)
    first = rng.integers(0, 5, size=40).astype(float)
    second = first + rng.normal(size=40)
    result = compute(cache, name, first.tolist(), second.tolist())
    assert result[name] == pytest.approx(spearmanr(first, second).statistic)


def test_rankings(cache):
    rng = np.random.default_rng(2)
    scores, relevance = rng.random((6, 15)), (rng.random((6, 15)) < 0.2).astype(float)
    relevance[0] = 0  # nothing to find: does not count
    order = np.argsort(-scores, axis=1)[:, :10]
    gains = [relevance[row, order[row]].tolist() for row in range(6)]
    ideal = [[1.0] * int(row.sum()) for row in relevance]
    some = relevance.sum(1) > 0
    expected = np.mean([ndcg_score(relevance[i : i + 1], scores[i : i + 1], k=10) for i in np.flatnonzero(some)])
    assert compute(cache, "ndcg_at10", gains, ideal)["ndcg_at10"] == pytest.approx(expected)
    share = np.mean([sum(gains[i]) / len(ideal[i]) for i in np.flatnonzero(some)])
    assert compute(cache, "recall_at10", gains, ideal)["recall_at10"] == pytest.approx(share)


def test_combined_by_path(cache):
    both = evaluate.combine([str(metric_path("accuracy")), str(metric_path("f1"))])
    both.add_batch(predictions=[0, 1], references=[0, 1])
    both.add(prediction=1, reference=0)
    result = both.compute()
    assert result["accuracy"] == pytest.approx(2 / 3) and result["f1"] == pytest.approx(2 / 3)
    assert result["accuracy_low"] <= result["accuracy"] <= result["f1_high"]
