"""The benchmark's results file: it goes on where it stopped, and refuses figures of another protocol."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bench_figures import bench, result

store = bench("store")
PROTOCOL: dict[str, Any] = {"threads": 1, "model": {"sha256": "ab"}, "calibration": {"windows": 8}, "texts": ("a", "b")}
BEST = result("best", "effort", {"novel": 0.1})
RIVAL = result("autoround", "peer", {"novel": 0.2})


def test_results_are_taken_up_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "quality.json"
    first = store.Store(path, PROTOCOL)
    first.add(BEST)
    first.write({"x": 1})
    second = store.Store(path, PROTOCOL)
    assert second.results == {"best:W4g64": BEST}
    second.add(RIVAL)
    second.add({**BEST, "peak_mb": 5.0})
    second.write({})
    third = store.Store(path, PROTOCOL)
    assert list(third.results) == ["best:W4g64", "autoround:W4g64"]
    assert third.results["best:W4g64"]["peak_mb"] == 5.0
    assert third.results["autoround:W4g64"]["about"] == RIVAL["about"]  # its own date, commit, versions, hardware
    assert [file.name for file in path.parent.iterdir()] == ["quality.json"]


def test_two_runs_fill_one_file(tmp_path: Path) -> None:
    one, other = (store.Store(tmp_path / "quality.json", PROTOCOL) for _ in range(2))
    for run, measured in ((one, BEST), (other, RIVAL)):
        run.add(measured)
        run.write({})
    assert list(store.Store(tmp_path / "quality.json", PROTOCOL).results) == ["best:W4g64", "autoround:W4g64"]


def test_what_is_dropped_does_not_come_back_from_the_file(tmp_path: Path) -> None:
    kept = store.Store(tmp_path / "quality.json", PROTOCOL)
    kept.add(BEST)
    kept.write({})
    again = store.Store(tmp_path / "quality.json", PROTOCOL)
    again.drop(BEST["variant"])
    again.add(RIVAL)
    assert list(again.results) == ["autoround:W4g64"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threads": 2}, "threads: 1, now 2"),
        ({"model": {"sha256": "cd"}}, "model.sha256: ab, now cd"),
        ({"calibration": {"windows": 128}}, "calibration.windows: 8, now 128"),
        ({"seed": 0}, "seed: None, now 0"),
    ],
)
def test_another_protocol_is_refused_and_the_file_left_alone(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "quality.json"
    earlier = store.Store(path, PROTOCOL)
    earlier.add(BEST)
    earlier.write({})
    before = path.read_bytes()
    with pytest.raises(store.OtherProtocol, match=message):
        store.Store(path, {**PROTOCOL, **change})
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": 1, "results": []}', '{"protocol": {}, "results": []}'])
def test_a_file_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "quality.json"
    path.write_text(text)
    with pytest.raises(store.OtherProtocol, match="another --output"):
        store.Store(path, PROTOCOL)


def test_a_result_on_other_threads_is_refused(tmp_path: Path) -> None:
    with pytest.raises(store.OtherProtocol, match="ran on 4 threads, not on 1"):
        store.Store(tmp_path / "quality.json", PROTOCOL).add({**BEST, "threads": 4})


def test_nothing_is_lost_when_writing_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "quality.json"
    kept = store.Store(path, PROTOCOL)
    kept.add(BEST)
    kept.write({})

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store.os, "replace", killed)
    kept.add(RIVAL)
    with pytest.raises(KeyboardInterrupt):
        kept.write({})
    assert list(store.Store(path, PROTOCOL).results) == ["best:W4g64"]
    assert json.loads(path.read_text())["results"] == [BEST]


def test_fingerprints_tell_files_and_their_order(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"1")
    two.write_bytes(b"2")
    prints = {store.fingerprint(one), store.fingerprint(two), store.fingerprint(one, two), store.fingerprint(two, one)}
    assert len(prints) == 4
    assert store.fingerprint(one) in prints
    with pytest.raises(FileNotFoundError):
        store.fingerprint()
