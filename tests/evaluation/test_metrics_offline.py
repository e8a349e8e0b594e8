"""The metric files: values, intervals, and loading with no network and several at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hf_shrink.errors import CalibrationError, RecipeError, ShrinkError
from hf_shrink.evaluation.bootstrap import ratio_interval
from hf_shrink.evaluation.metrics import NAMES, load_metric

RATIOS = ("bits_per_byte", "cosine", "kl_divergence", "perplexity", "top1_agreement")


def test_a_file_is_a_metric():
    files = (Path(__file__).parents[2] / "hf_shrink" / "evaluation" / "metrics").glob("[!_]*.py")
    assert sorted(NAMES) == sorted(file.stem for file in files) and set(RATIOS) < set(NAMES)


@pytest.mark.parametrize("name", RATIOS)
def test_value_is_the_ratio_of_the_sums(name, tmp_path):
    metric = load_metric(name, tmp_path)
    metric.add_batch(predictions=[6.0, 2.0], references=[3, 4])
    metric.add_batch(predictions=[1.0], references=[2])
    result = metric.compute()
    expected = {"perplexity": np.e, "bits_per_byte": 1 / np.log(2)}.get(name, 1.0)
    assert result[name] == pytest.approx(expected, rel=1e-12)
    assert result["low"] < expected < result["high"]


def test_two_of_one_kind_do_not_mix(tmp_path):
    first, second = load_metric("perplexity", tmp_path), load_metric("perplexity", tmp_path)
    first.add(prediction=1.0, reference=1)
    second.add(prediction=2.0, reference=1)
    assert first.compute()["perplexity"] == pytest.approx(np.e)
    assert second.compute()["perplexity"] == pytest.approx(np.e**2)


def test_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        counts = rng.integers(50, 200, size=40)
        sums = counts * rng.normal(3.0, 0.5, size=40)
        _, low, high = ratio_interval(sums.tolist(), counts.tolist(), seed=trial)
        hits += low <= 3.0 <= high
    assert 180 <= hits <= 198


def test_interval_is_repeatable_and_needs_something():
    assert ratio_interval([1.0, 2.0, 4.0], [2, 3, 4], 7) == ratio_interval([1.0, 2.0, 4.0], [2, 3, 4], 7)
    assert ratio_interval([3.0, 0.0], [2, 0]) == (1.5, None, None)
    with pytest.raises(CalibrationError, match="no position to score"):
        ratio_interval([0.0], [0])
    with pytest.raises(CalibrationError, match="sequence 1"):
        ratio_interval([0.0, float("inf")], [1, 1])


def test_unknown_metric_names_the_nearest(tmp_path):
    with pytest.raises(RecipeError, match="did you mean 'kl_divergence'"):
        load_metric("kl_divergense", tmp_path)


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluate.config.HF_MODULES_CACHE", tmp_path / "a_file" / "modules")
    (tmp_path / "a_file").write_text("in the way")
    with pytest.raises(ShrinkError, match="HF_MODULES_CACHE"):
        load_metric("perplexity", tmp_path)


SCRIPT = """
import os, socket, sys, traceback
def refuse(*args, **kwargs): raise SystemExit("the network was tried")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import evaluate
from hf_shrink.evaluation.metrics import load_metric
assert not os.path.exists(evaluate.config.HF_MODULES_CACHE)
start, go = os.pipe()
children = []
for _ in range(2):
    child = os.fork()
    if not child:
        code = 1
        try:
            os.read(start, 1)
            for name in sys.argv[2:]:
                found = load_metric(name, sys.argv[1]).compute(predictions=[1.0, 2.0], references=[1, 2])
                os.write(1, f"{name} {found[name]}{chr(10)}".encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    children.append(child)
os.write(go, b"..")
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


@pytest.mark.slow
def test_two_processes_at_once_without_a_network(tmp_path):
    """Both start with empty caches, so that both also copy the metric files there; only what they import is shared."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    environment = {**os.environ, **offline, "PYTHONPATH": str(Path(__file__).parents[2])}
    environment.pop("HF_MODULES_CACHE", None)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "metrics"), *RATIOS]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    assert sorted(line.split()[0] for line in done.stdout.splitlines()) == sorted([*RATIOS, *RATIOS])
    assert not list((tmp_path / "metrics").rglob("*.arrow")), "totals stay in memory"
