"""The benchmark's protocol pieces, against transformers' own loss and by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from from_scripts import load_script
from tiny import TEXT, tiny_llama, tiny_tokenizer

common = load_script("bench/common.py")


def test_perplexity_is_the_exponential_of_transformers_loss() -> None:
    model = tiny_llama()
    rows = torch.randint(3, 320, (3, 24))
    expected = torch.stack([model(row[None], labels=row[None]).loss for row in rows]).mean().exp()
    assert common.perplexity(model, rows) == pytest.approx(expected.item(), rel=1e-5)


def test_windows_are_consecutive_and_complete(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    tokenizer = tiny_tokenizer()
    rows = common.windows(tokenizer, text, 4, 16)
    assert rows.flatten().tolist() == tokenizer(TEXT, add_special_tokens=False).input_ids[:64]
    with pytest.raises(ValueError, match="are needed"):
        common.windows(tokenizer, text, 100, 512)


def test_peak_memory_counts_what_was_freed() -> None:
    code = f"import sys; sys.path.insert(0, {str(Path(common.__file__).parent)!r}); from common import peak_memory_mb; "
    code += (
        "before = peak_memory_mb(); block = bytearray(int(before * 1e6) + 50_000_000); block[::4096] = block[::4096]"
    )
    code += "; size = len(block) / 1e6; del block; assert peak_memory_mb() >= size > before"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_fresh_process_reports_its_last_json_line_and_fails_loudly() -> None:
    code = "import json, os; print('noise'); print(json.dumps({'threads': os.environ['OMP_NUM_THREADS']}))"
    assert common.run_fresh([sys.executable, "-c", code], threads=1) == {"threads": "1"}
    with pytest.raises(RuntimeError, match="ended with 3"):
        common.run_fresh([sys.executable, "-c", "raise SystemExit(3)"], threads=1)


def test_results_say_what_was_measured_on(tmp_path: Path) -> None:
    path = common.write_results("x", {"value": 1}, tmp_path / "deep" / "x.json")
    content = json.loads(path.read_text())
    assert content["value"] == 1
    assert content["versions"]["torch"] == torch.__version__
    assert content["hardware"]["cores"] >= 1


def test_the_commit_says_whether_code_but_not_whether_results_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*words: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    monkeypatch.setattr(common, "ROOT", tmp_path)
    results, code = tmp_path / "scripts" / "bench" / "results" / "x.json", tmp_path / "code.py"
    results.parent.mkdir(parents=True)
    code.write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "x")
    clean = common.git_commit()
    assert len(clean) >= 4
    results.write_text("{}")
    assert common.git_commit() == clean
    code.write_text("2")
    assert common.git_commit() == clean + "+"
