"""The terminal: a table that also reads as plain text, progress where it helps, and silence underneath."""

from __future__ import annotations

import io
import logging
import warnings

import datasets
import pytest
from huggingface_hub.utils import are_progress_bars_disabled
from reporting.record_example import bare_record, full_record
from transformers.utils import logging as transformers_logging

from hf_shrink.evaluation.answers import same_answer
from hf_shrink.report import ShrinkReport
from hf_shrink.reporting import Progress, plain_table, print_table, silence
from hf_shrink.reporting.figures import count, metric_row, size


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_text_away_from_a_terminal():
    text = plain_table(full_record().report, title="tiny")
    assert text.isascii() and "\x1b" not in text
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert "480 kB" in lines["Size"] and "120 kB" in lines["Size"] and "4.00x smaller" in lines["Size"]
    assert "12 [10.8, 13.2]" in lines["Perplexity"] and "13 [11.7, 14.3]" in lines["Perplexity"]
    assert "20 [19, 21] tokens/s" in lines["Decoding"] and "30 [28.5, 31.5] tokens/s" in lines["Decoding"]
    assert "8,176" in text


def test_colour_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    screen = Terminal()
    print_table(full_record().report, file=screen)
    assert "\x1b[" in screen.getvalue()


def test_what_is_missing_is_left_out():
    text = plain_table(ShrinkReport())
    assert "|" not in text and "not measured" in text
    assert "blocks of <unequal> width" in plain_table(bare_record().report)
    bare_figures = ShrinkReport(evaluation={"data": "x", "dense": {}, "compressed": {"perplexity": 7.25}})
    (line,) = (line for line in plain_table(bare_figures).splitlines() if "Perplexity" in line)
    assert [cell.strip() for cell in line.strip("|").split("|")] == ["Perplexity", "-", "7.25", ""]


def test_a_reason_is_given_for_a_skipped_metric():
    report = ShrinkReport(evaluation={"compressed": {"cosine": 0.9}, "skipped": {"perplexity": "no tokens"}})
    assert "Perplexity is not given: no tokens." in plain_table(report)


@pytest.mark.parametrize(
    ("amount", "text"), [(999, "999 bytes"), (1000, "1 kB"), (173_001_234, "173 MB"), (999_900_000, "1 GB")]
)
def test_sizes_read_well(amount, text):
    assert size(amount) == text


def test_counts_read_well():
    assert [count(n) for n in (7, 120_000, 134_515_008, 8_030_000_000)] == ["7", "120K", "135M", "8.03B"]


def steps(progress):
    with progress:
        for what in ("calibrate", "solve"):
            for done in (1, 2, 3):
                progress(what, done, 3)


def test_a_bar_on_a_terminal():
    screen = Terminal()
    steps(Progress(file=screen))
    assert "calibrate" in screen.getvalue() and "solve" in screen.getvalue() and "3/3" in screen.getvalue()


def test_lines_in_a_log_and_nothing_when_quiet():
    log = io.StringIO()
    steps(Progress(file=log))
    assert [line.split(" (")[0] for line in log.getvalue().splitlines()] == ["calibrate: 3/3", "solve: 3/3"]
    quiet, screen = io.StringIO(), Terminal()
    steps(Progress(quiet=True, file=quiet))
    steps(Progress(quiet=True, file=screen))
    assert quiet.getvalue() == screen.getvalue() == ""


def test_silence_is_restored_even_after_an_error():
    transformers_logging.set_verbosity_warning()
    before = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
        datasets.are_progress_bars_disabled(),
        datasets.logging.get_verbosity(),
        are_progress_bars_disabled(),
    )
    with pytest.raises(KeyError), silence():
        assert transformers_logging.get_verbosity() == logging.ERROR
        assert not transformers_logging.is_progress_bar_enabled()
        assert datasets.are_progress_bars_disabled() and are_progress_bars_disabled()
        with warnings.catch_warnings(record=True) as seen:
            warnings.warn("a wall of these", stacklevel=1)
        assert seen == []
        raise KeyError
    after = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
        datasets.are_progress_bars_disabled(),
        datasets.logging.get_verbosity(),
        are_progress_bars_disabled(),
    )
    assert after == before
    with warnings.catch_warnings(record=True) as seen, silence(enabled=False):
        warnings.simplefilter("always")
        warnings.warn("heard", stacklevel=1)
    assert len(seen) == 1


def test_metrics_of_all_kinds_and_the_group_that_fares_worst():
    by_group = {
        "north": {"rows": 9, "model": {"value": 0.5, "low": 0.4, "high": 0.6}, "baseline": {"value": 0.75}},
        "south": {"rows": 7, "model": {"value": 0.9}, "baseline": {"value": 0.9}},
    }
    evaluation = {
        "compressed": {"latency": 0.0123, "weight_bytes": 1_500_000, "accuracy": 0.8, "made_up": 0.25},
        "dense": {"latency": 0.02},
        "groups": {"accuracy": {"worst": "north", "by_group": by_group}, "made_up": {}},
        "context": 512,
        "stride": 256,
    }
    text = plain_table(ShrinkReport(evaluation=evaluation))
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line]
    assert ["Accuracy", "-", "0.8", ""] in lines and ["Made up", "-", "0.25", ""] in lines
    assert ["Latency", "20 ms", "12.3 ms", ""] in lines and ["Weights in memory", "-", "1.5 MB", ""] in lines
    assert ["Accuracy, group north", "0.75", "0.5 [0.4, 0.6]", ""] in lines
    assert "windows 256 tokens apart" in text


def test_hints_say_what_is_measured():
    """The latency's input is made up; answers are the same but for case, punctuation and articles."""
    assert "made-up input" in metric_row("latency")[1] and "data" not in metric_row("latency")[1]
    assert same_answer("The Sand.", ["sand"])
    assert "but for case, punctuation and articles" in metric_row("exact_match")[1]
