"""AutoRound's AutoScheme, its search over mixed bits, run by the peer's own Python: JSON in, JSON out.

    ~/.peers/autoround/bin/python scripts/bench/autoscheme.py JOB

A job: model (folder), calibration and held_out (text files), samples, held_out_samples, length, bits (the average, with
scales and zero points), iterations, threads, output (folder, for a float32 model of the rounded weights). The scheme is
searched on the first SEARCHED of the windows that the weights are learned on: AutoScheme's own default. Half of the
search on all 128 took 33 minutes on two busy cores.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from autoround import dense
from common import folder_bytes, peak_memory_mb, perplexity, stopwatch, windows

OPTIONS = ("W2A16", "W3A16", "W4A16", "W8A16")
SEARCHED = 16
GROUP = 64  # 128 does not divide the model's width


def measure(job: dict[str, Any]) -> dict[str, Any]:
    import torch
    from auto_round import AutoRound
    from auto_round.auto_scheme import AutoScheme
    from auto_round.schemes import PRESET_SCHEMES
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(job["threads"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    rows = windows(tokenizer, Path(job["calibration"]), job["samples"], job["length"])
    held_out = {
        Path(path).stem: windows(tokenizer, Path(path), job["held_out_samples"], job["length"])
        for path in job["held_out"]
    }
    options = [copy.deepcopy(PRESET_SCHEMES[name]) for name in OPTIONS]
    for option in options:
        option.group_size, option.sym = GROUP, option.bits > 2
    with tempfile.TemporaryDirectory() as folder:
        # AutoScheme reads text from a file, and drops what is too short in tokens: each has an eighth more.
        texts = Path(folder) / "windows.json"
        joined = rows.reshape(-1)
        step = job["length"]
        parts = [joined[n : n + step + step // 8] for n in range(0, len(joined) - step - step // 8, step)]
        texts.write_text(json.dumps([{"text": tokenizer.decode(part)} for part in parts]))
        scheme = AutoScheme(
            avg_bits=job["bits"],
            options=options,
            nsamples=SEARCHED,
            seqlen=step,
            device_map="cpu",
            enable_torch_compile=False,
        )
        with stopwatch() as times:
            model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
            rounding = AutoRound(
                model,
                tokenizer,
                scheme=scheme,
                iters=job["iterations"],
                seqlen=step,
                nsamples=len(parts),
                batch_size=4,
                dataset=str(texts),
                device_map="cpu",
            )
            out = Path(folder) / "out"
            rounding.quantize_and_save(str(out), format="auto_round")
        saved = next(out.rglob("config.json")).parent
        small = dense(job["model"], saved)
        small.save_pretrained(job["output"])
        tokenizer.save_pretrained(job["output"])
        return {
            "seconds_with_loading": times["seconds"],
            "peak_mb": peak_memory_mb(),
            "weight_bytes": folder_bytes(saved),
            "searched_windows": SEARCHED,
            "perplexity": {name: perplexity(small, windows_) for name, windows_ in held_out.items()},
            "threads": torch.get_num_threads(),
        }


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
