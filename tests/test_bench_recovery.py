"""scripts/bench/recovery.py on a tiny model: what it measures of one variant, and how it takes up a results file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from from_scripts import load_script
from tiny import TEXT, tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("bench")
    tiny_llama(num_hidden_layers=5).save_pretrained(made / "model")
    tiny_tokenizer().save_pretrained(made / "model")
    for name in ("emma", "mansfieldpark", "prideprejudice"):
        (made / f"{name}.txt").write_text(TEXT * 6)
    return made


def test_one_variant_and_a_results_file(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    bench = load_script("bench/recovery.py")
    monkeypatch.setattr(bench, "LENGTH", 24)
    asked: list[str] = []

    def here(command: list[str], threads: int) -> dict:
        asked.append(command[-1])
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", command[1:])
            bench.main()
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    monkeypatch.setattr(bench, "run_fresh", here)
    words = ["recovery.py", "--model", str(folder / "model"), "--data", str(folder), "--only", "depth20"]
    words += ["--threads", "1", "--samples", "4", "--written", "2", "--read", "8", "--held-out-samples", "3"]
    words += ["--minutes", "0", "--output", str(folder / "found.json"), "--set", "steps=3", "tokens=48"]
    monkeypatch.setattr(sys, "argv", words)
    for _ in range(2):  # the second finds everything there
        bench.main()
    assert asked == ["depth20"]
    (result,) = json.loads((folder / "found.json").read_text())["results"].values()
    assert result["steps"] == 3 and result["options"]["rank"] == 32 and result["recovery"]["cpu_seconds"] > 0
    for figures in result["texts"].values():
        assert figures["gone"] == pytest.approx(1 - figures["after"] / figures["before"])
        assert figures["divergence_before"] > 0
