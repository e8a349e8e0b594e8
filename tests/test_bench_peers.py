"""Command lines of the peers, and what is read of what their runner prints; no peer is run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from bench_figures import bench

peers, variants = bench("peers"), bench("variants")
W4, W2 = variants.settings([4, 2], 64, [2])


def runner_at(folder: Path) -> Any:
    texts = (folder / "novel.txt", folder / "plays.txt")
    script, calibration = folder / "peers" / "run.py", folder / "emma.txt"
    return peers.Runner(script, folder / "home", folder / "dense", calibration, texts, 128, 2)


def test_command_lines_have_the_common_protocol(tmp_path: Path) -> None:
    runner = runner_at(tmp_path)
    found, _ = peers.peer_variants(["llmcompressor-gptq", "gptqmodel"], [W4, W2], 64)
    lines = {v.id: runner.command(v, Path("OUT")) for v in found}
    assert list(lines) == [
        "llmcompressor-gptq:W4g64",
        "llmcompressor-gptq:W2g64-asymmetric",
        "gptqmodel:W4g64",
        "gptqmodel:W2g64-asymmetric",
    ]
    rest = f"--model {tmp_path}/dense --calibration {tmp_path}/emma.txt --heldout {tmp_path}/novel.txt"
    rest += f" {tmp_path}/plays.txt --samples 128 --threads 2 --output OUT"
    start = f"{tmp_path}/home/llmcompressor/bin/python {tmp_path}/peers/run.py llmcompressor-gptq"
    assert " ".join(lines["llmcompressor-gptq:W4g64"]) == f"{start} --bits 4 --group 64 {rest}"
    assert " ".join(lines["gptqmodel:W2g64-asymmetric"]).endswith(f"gptqmodel --bits 2 --group 64 --asymmetric {rest}")


def test_a_script_of_ours_gets_the_same_as_a_job(tmp_path: Path) -> None:
    python, script, text = runner_at(tmp_path).command(AUTOROUND_W2, Path("OUT"))
    assert python == f"{tmp_path}/home/autoround/bin/python"
    assert Path(script).is_file() and Path(script).name == "autoround.py"
    job = json.loads(text)
    assert job["held_out"] == [f"{tmp_path}/novel.txt", f"{tmp_path}/plays.txt"]
    assert job["calibration"] == f"{tmp_path}/emma.txt" and job["model"] == f"{tmp_path}/dense"
    assert [job[name] for name in ("bits", "group", "symmetric", "iterations")] == [2, 64, False, 200]
    assert [job[name] for name in ("samples", "held_out_samples", "length", "threads")] == [128, 40, 512, 2]
    assert job["output"] == "OUT"


def test_tools_with_a_format_of_their_own_are_measured_once() -> None:
    found, left_out = peers.peer_variants(list(peers.PEERS), [W4, W2], 64, 50)
    assert [v.id for v in found] == [
        "llmcompressor-gptq:W4g64",
        "llmcompressor-gptq:W2g64-asymmetric",
        "autoround-50:W4g64",
        "autoround-50:W2g64-asymmetric",
        "gptqmodel:W4g64",
        "gptqmodel:W2g64-asymmetric",
        "bitsandbytes-nf4:W4g64-nf4",
        "torchao-int4:W4g64-asymmetric",
        "quanto-int4:W4-asymmetric-own-groups",
    ]
    assert left_out == {"bitsandbytes-int8": "has 8 bits only, which --bits does not name"}
    assert W4.to_dict() not in [v.setting.to_dict() for v in found if v.name.split("-")[0] in ("torchao", "quanto")]


@pytest.mark.parametrize("name", peers.PEERS)
def test_every_peer_of_the_runner_has_a_command_line(tmp_path: Path, name: str) -> None:
    eight = variants.Setting(8, 64)
    found, left_out = peers.peer_variants([name], [W4, eight], 64)
    assert found and not left_out
    for variant in found:
        command = runner_at(tmp_path).command(variant, Path("OUT"))
        if peers.PEERS[name].own is not None:
            continue
        assert command[2] == name
        assert all(isinstance(word, str) for word in command)
        assert "--asymmetric" not in command  # none was asked; what a tool has by itself is no option of it


def test_a_missing_environment_is_told_with_its_remedy(tmp_path: Path) -> None:
    runner, peer = runner_at(tmp_path), peers.PEERS["gptqmodel"]
    assert runner.missing(peer) == f"not installed: bash {tmp_path}/peers/setup.sh gptqmodel"
    python = tmp_path / "home" / "gptqmodel" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("")
    assert runner.missing(peer) is None


PRINTED: dict[str, Any] = {
    "peer": "llmcompressor-gptq",
    "bits": 2,
    "group": 64,
    "symmetric": False,
    "seconds": 12.5,
    "peak_rss_mb": 1000,
    "decode_tokens_per_second": None,
    "perplexity": {"plays": 20.0, "novel": 30.0},
    "threads": 1,
}
GPTQ_W2 = variants.Variant("llmcompressor-gptq", "peer", W2)
AUTOROUND_W2 = variants.Variant("autoround", "peer", W2, 200)


def test_what_the_runner_prints_is_read() -> None:
    assert peers.read(PRINTED, GPTQ_W2, ["novel", "plays"], 1) == {
        "seconds_with_loading": 12.5,
        "peak_mb": 1024.0,
        "decode_tokens_per_second": None,
        "perplexity": {"novel": 30.0, "plays": 20.0},
        "threads": 1,
    }


@pytest.mark.parametrize(
    "change",
    [
        {"bits": 4},
        {"group": 128},
        {"symmetric": True},
        {"threads": 2},
        {"peer": "gptqmodel"},
        {"perplexity": {"novel": 30.0}},
    ],
)
def test_something_else_than_asked_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match="llmcompressor-gptq:W2g64-asymmetric measured something else"):
        peers.read({**PRINTED, **change}, GPTQ_W2, ["novel", "plays"], 1)


def test_tools_of_their_own_format_say_bits_and_group_that_mean_nothing() -> None:
    (variant,), _ = peers.peer_variants(["quanto-int4"], [W4], 64)
    printed = {**PRINTED, "peer": "quanto-int4", "bits": 4, "symmetric": True}
    assert peers.read(printed, variant, ["novel"], 1)["perplexity"] == {"novel": 30.0}


def test_a_run_counts_bytes_and_records_versions(tmp_path: Path) -> None:
    runner = runner_at(tmp_path)
    python = tmp_path / "home" / "llmcompressor" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    runner.script.parent.mkdir()
    runner.script.write_text(
        "import json, os, pathlib, sys\n"
        "out = pathlib.Path(sys.argv[sys.argv.index('--output') + 1], 'below'); out.mkdir()\n"
        "(out / 'model.safetensors').write_bytes(b'x' * 77)\n"
        f"printed = json.loads({json.dumps(PRINTED)!r})\n"
        "printed['threads'] = int(os.environ['OMP_NUM_THREADS'])\n"
        "print('noise'); print(json.dumps(printed))\n"
    )
    found = runner.run(GPTQ_W2)
    assert found["variant"] == "llmcompressor-gptq:W2g64-asymmetric"
    assert found["weight_bytes"] == 77
    assert found["threads"] == 2
    assert set(found["about"]) == {"date", "commit", "versions", "hardware"}
    assert set(found["about"]["versions"]) == {"python", "llmcompressor", "compressed-tensors", "torch", "transformers"}
