"""The commands on a tiny model: what they print and write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stock import Stock
from tiny import TEXT, tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM

from hf_shrink import LoadingConfig
from hf_shrink.cli import main
from hf_shrink.cli.options import evaluation_of
from hf_shrink.errors import CalibrationError
from hf_shrink.recipe import Recipe
from hf_shrink.recipe.specs import METRICS

SMALL = [
    "--set=calibration.samples=8",
    "--set=calibration.length=24",
    "--set=evaluation.samples=4",
    "--set=evaluation.length=24",
]
GPTQ = """
portable: true
steps: [{quantize: {scheme: W4A16, group_size: 16, method: gptq}}]
calibration: {samples: 8, length: 24}
evaluation: {metrics: [], length: 24}
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "source"
    tiny_llama(num_hidden_layers=2).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    return folder


@pytest.fixture(scope="module")
def output(source: Path) -> Path:
    out = source.parent / "out"
    assert main(["run", str(source), "--output", str(out), "--quiet", *SMALL]) == 0
    return out


def test_run_writes_a_whole_folder(output: Path) -> None:
    names = {path.name for path in output.iterdir()}
    assert names >= {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "README.md",
        "shrink.json",
        "report.html",
        "plots",
    }
    assert list((output / "plots").glob("*.png"))
    record = json.loads((output / "shrink.json").read_text())
    assert record.keys() >= {"hf_shrink_version", "source", "recipe", "plan", "report", "versions"}
    evaluation = record["report"]["evaluation"]
    assert {"perplexity", "kl_divergence", "top1_agreement"} <= evaluation["compressed"].keys()
    assert evaluation["speed"]["dense"] > 0
    card = (output / "README.md").read_text()
    assert "license: mit" in card
    assert f"Calibrated on {record['report']['calibration']['description']}" in card
    assert Recipe.from_dict(record["recipe"]).calibration.samples == 8  # what is printed can be run again


def test_run_again_needs_overwrite_and_gives_the_same_weights(source: Path, output: Path) -> None:
    arguments = ["run", str(source), "--output", str(output), "--quiet", *SMALL]
    before = (output / "model.safetensors").read_bytes()
    assert main(arguments) == 2
    record = str(output / "shrink.json")  # as the report says
    again = ["run", str(source), "--recipe", record, "--output", str(output), "--quiet", "--overwrite"]
    assert main(again) == 0
    assert (output / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in output.parent.iterdir()) == ["out", "source"]


def test_stock_transformers_loads_the_result(output: Path, stock_process: Stock) -> None:
    ids = torch.arange(5, 25)[None]
    found = stock_process.logits(output, "AutoModelForCausalLM", ids.tolist())
    with torch.no_grad():
        # As stored: fast kernels round the inputs.
        ours = AutoModelForCausalLM.from_pretrained(output, quantization_config=LoadingConfig(optimize=False))
        logits = ours(ids).logits
    torch.testing.assert_close(found, logits, rtol=1e-3, atol=1e-3)


def test_plan_prints_and_writes_what_run_takes(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.json"
    assert main(["plan", str(source), "--recipe", "prune20-w4a16", "--json", str(path), "--quiet", *SMALL]) == 0
    printed = capsys.readouterr().out
    assert "note: asked to remove 20.0% of the blocks' parameters, removed 0.0%" in printed  # of two blocks
    assert "W4A16" in printed
    out, text = tmp_path / "out", tmp_path / "text.txt"
    text.write_text(TEXT * 8)  # a plan takes no --set, and its default is more than this test needs
    run = ["run", str(source), "--recipe", str(path), "--calibration", str(text), "--output", str(out), "--quiet"]
    assert main([*run, "--evaluation=none"]) == 0
    config = json.loads((out / "config.json").read_text())
    assert config["num_hidden_layers"] == 2 and config["quantization_config"]["hf_shrink"] == 1


def test_a_plan_keeps_the_dtype_and_is_measured_as_asked(source: Path, tmp_path: Path) -> None:
    path, text = tmp_path / "plan.json", tmp_path / "text.txt"
    text.write_text(TEXT * 8)
    own = ["--set=dtype=bfloat16", "--set=quantize.effort=fast", "--set=quantize.method=rtn", "--quiet"]
    assert main(["plan", str(source), "--recipe", "w4a16", "--json", str(path), *SMALL, *own]) == 0
    run = ["run", str(source), "--recipe", str(path), "--quiet", "--output"]
    assert main([*run, str(tmp_path / "unmeasured"), "--evaluation=none"]) == 0
    assert main([*run, str(tmp_path / "measured"), f"--evaluation={text}"]) == 0
    assert main([*run, str(tmp_path / "wrong"), "--evaluation=no-such-file.txt"]) == 2
    assert not (tmp_path / "wrong").exists()
    dtypes = {tensor.dtype for tensor in load_file(tmp_path / "unmeasured" / "model.safetensors").values()}
    assert torch.bfloat16 in dtypes and torch.float32 not in dtypes
    found = [json.loads((tmp_path / name / "shrink.json").read_text()) for name in ("unmeasured", "measured")]
    assert not found[0]["report"]["evaluation"]
    assert text.name in json.dumps(found[1]["report"]["evaluation"])


def test_a_plan_calibrates_as_its_recipe_would_have(source: Path, tmp_path: Path) -> None:
    """Its file of text too; and what its card says does the same once more."""
    path, text, recipe = tmp_path / "plan.json", tmp_path / "text.txt", tmp_path / "gptq.yaml"
    text.write_text(TEXT * 8)
    recipe.write_text(GPTQ)
    own = ["--recipe", str(recipe), "--calibration", str(text), "--set=calibration.samples=6", "--quiet"]
    assert main(["run", str(source), "--output", str(tmp_path / "recipe"), *own]) == 0
    assert main(["plan", str(source), "--json", str(path), *own]) == 0
    again = ["run", str(source), "--evaluation=none", "--quiet", "--recipe"]
    assert main([*again, str(path), "--output", str(tmp_path / "plan")]) == 0
    assert main([*again, str(tmp_path / "plan" / "shrink.json"), "--output", str(tmp_path / "again")]) == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("recipe", "plan", "again")]
    assert weights[0] == weights[1] == weights[2]


def test_what_was_asked_for_wrongly_does_not_stand_in_the_way(source: Path, tmp_path: Path) -> None:
    """Text to measure on is written before the calibration's file is missed."""
    text, recipe = tmp_path / "text.txt", tmp_path / "gptq.yaml"
    recipe.write_text(GPTQ)
    run = ["run", str(source), "--output", str(tmp_path / "out"), "--quiet", "--recipe", str(recipe)]
    run += ["--set=evaluation.metrics=[perplexity]", "--set=evaluation.samples=2"]
    assert main([*run, "--calibration", str(tmp_path / "txet.txt")]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["gptq.yaml"]
    text.write_text(TEXT * 8)
    assert main([*run, "--calibration", str(text)]) == 0


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(),
        CalibrationError("too little data"),
        pytest.param(OSError("disk full"), marks=pytest.mark.slow),
        torch.OutOfMemoryError("out of memory"),
    ],
)
def test_a_recovery_that_was_cut_off_says_how_to_do_it_again(
    error: BaseException,
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def dies(*given: Any, **named: Any) -> None:
        raise error

    out = tmp_path / "with space"
    monkeypatch.setattr("hf_shrink.cli.run.recovering", lambda: dies)
    arguments = ["--set=quantize.method=rtn", "--set=quantize.effort=fast", "--evaluation=none", "--quiet"]
    assert main(["run", str(source), "--output", str(out), "--recover", "2", *arguments]) == 1
    said = capsys.readouterr().err
    assert (str(error) or "interrupted") in said
    assert f"hf-shrink recover '{out}' --output '{out}' --overwrite --baseline {source} --data self --minutes 2" in said
    assert (out / "model.safetensors").is_file()


def test_a_recovery_writes_its_progress_where_the_run_does(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, data = tmp_path / "log.txt", tmp_path / "text.txt"
    data.write_text(TEXT * 4)
    arguments = ["--set=quantize.method=rtn", "--set=quantize.effort=fast", "--evaluation=none"]
    arguments += ["--recover", "0.02", "--calibration", str(data), "--log-file", str(log)]
    assert main(["run", str(source), "--output", str(tmp_path / "out"), *arguments]) == 0
    assert "reading the dense model" in log.read_text() and "reading" not in capsys.readouterr().err


def test_inspect(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(source)]) == 0
    printed = capsys.readouterr().out
    for word in ("decoder", "query", "down", "KV groups", "channels"):
        assert word in printed


def test_evaluate(source: Path, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "figures.json"
    arguments = ["evaluate", str(output), "--baseline", str(source), "--samples=4", "--length=24", "--json", str(path)]
    assert main([*arguments, "--quiet"]) == 0
    figures = json.loads(path.read_text())
    assert 0 < figures["model"]["kl_divergence"]["value"] < 1
    assert "top1_agreement" in capsys.readouterr().out


@pytest.mark.parametrize("metrics", [(), ("perplexity",)])
def test_who_names_data_to_measure_on_gets_figures(metrics: tuple[str, ...]) -> None:
    recipe = Recipe.from_dict({"steps": [{"quantize": {}}], "evaluation": {"metrics": list(metrics), "samples": 3}})
    assert evaluation_of(recipe, None).metrics == metrics
    assert evaluation_of(recipe, "none").metrics == ()
    asked = evaluation_of(recipe, "notes.txt")
    assert (asked.data, asked.samples, asked.metrics) == ("notes.txt", 3, metrics or METRICS)


def test_evaluate_a_recipe_with_changes(output: Path, tmp_path: Path) -> None:
    """A built-in one and one's own; `--data` names either, or data."""
    mine, text, path = tmp_path / "ev.yaml", tmp_path / "text.txt", tmp_path / "figures.json"
    text.write_text(TEXT * 2)
    mine.write_text(f"data: {text}\nsamples: 8\nlength: 24\nmetrics: [perplexity]\n")
    arguments = ["evaluate", str(output), "--data", str(mine), "--samples=3", "--json", str(path), "--quiet"]
    assert main(arguments) == 0
    figures = json.loads(path.read_text())
    assert (figures["sequences"], figures["context"], set(figures["model"])) == (3, 24, {"perplexity"})


def test_a_misspelt_evaluation_recipe_is_refused(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On data of one's own it would be measured in another way, without a word."""
    assert main(["evaluate", str(output), "--recipe", "clasification", "--data", "rows.jsonl"]) == 2
    assert "did you mean 'classification'" in capsys.readouterr().err


def test_evaluate_a_recipe_on_rows_of_ones_own(
    source: Path, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, path = tmp_path / "questions.csv", tmp_path / "figures.json"
    rows = [f"what is it number {i},the sand,the rocks,{'AB'[i % 2]},{'even' if i % 2 else 'odd'}" for i in range(6)]
    data.write_text("\n".join(["question,first,second,answer,group", *rows]))
    arguments = ["evaluate", str(output), "--baseline", str(source), "--data", str(data), "--recipe", "multiple-choice"]
    assert main([*arguments, "--quiet"]) == 2
    assert "no column for 'choices'" in capsys.readouterr().err
    data = tmp_path / "questions.jsonl"
    lines = [row.split(",") for row in rows]
    data.write_text(
        "\n".join(json.dumps({"question": q, "choices": [a, b], "answer": c, "group": g}) for q, a, b, c, g in lines)
    )
    arguments[arguments.index("--data") + 1] = str(data)
    assert main([*arguments, "--quiet", "--samples=4", "--metrics=accuracy,flip_rate", "--json", str(path)]) == 0
    figures = json.loads(path.read_text())
    assert figures["sequences"] == 4 and set(figures["model"]) == {"accuracy", "flip_rate"}
    printed = capsys.readouterr().out
    assert "multiple-choice on 4 rows of questions.jsonl" in printed and "worst, " in printed
    assert main([*arguments, "--stride=3"]) == 2
    assert "--stride is about windows of text" in capsys.readouterr().err
    assert main([*arguments, "--metrics=acuracy"]) == 2
    assert "did you mean 'accuracy'" in capsys.readouterr().err


def test_bench(output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures, plot = tmp_path / "speed.json", tmp_path / "speed.png"
    few = ["--prompt=4", "--new=3", "--prefill=8", "--repeats=1", "--dense-dtypes", "float32", "--no-memory"]
    assert main(["bench", str(output), *few, "--json", str(figures), "--plot", str(plot), "--quiet"]) == 0
    body = json.loads(figures.read_text())
    assert list(body["models"]) == ["dense float32", "compressed"]
    assert plot.is_file()
    captured = capsys.readouterr()
    assert "compressed against dense float32: decode" in captured.out
    assert captured.err == ""


def test_report_and_recipes(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(output)]) == 0
    assert "perplexity" in capsys.readouterr().out.lower()
    assert main(["recipes"]) == 0
    printed = capsys.readouterr().out
    for name in (
        "w8a8",
        "fp8",
        "w8a16",
        "w4a16",
        "w3a16",
        "w2a16",
        "w8-full",
        "prune-depth",
        "prune-width",
        "prune20-searched",
        "prune20-w4a16",
        "wikitext",
        "multiple-choice",
    ):
        assert name in printed
    assert main(["recipes", "evaluation"]) == 0
    printed = capsys.readouterr().out
    assert "summarisation" in printed and "w4a16" not in printed
