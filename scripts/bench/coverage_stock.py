"""Load checkpoints in stock transformers, in a process that never imports hf_shrink. A worker of coverage.py.

Reads JSON lines {"class", "folder", "steps"} and answers each with {step: "ok" | "WRONG: ..." | the error}.
"""

from __future__ import annotations

import inspect
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import ModelOutput

NEAR = 1e-3  # packed weights may become dense in another order of operations


def tensors(value: Any) -> list[torch.Tensor]:
    """Every floating-point tensor in what a model returns, but for its KV cache."""
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    inner = value.values() if isinstance(value, ModelOutput) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in inner for tensor in tensors(item)]


def check(class_name: str, folder: Path, inputs: dict[str, torch.Tensor]) -> str:
    try:
        model = getattr(transformers, class_name).from_pretrained(folder).eval()
        options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
        with torch.no_grad():
            torch.manual_seed(0)
            found = tensors(model(**inputs, **options))
    except Exception as error:  # any error is a result here
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {' '.join(lines[:2])[:240]}"
    expected = torch.load(folder / "expected.pt")
    if [t.shape for t in found] != [t.shape for t in expected]:
        return "WRONG: other shapes"
    off = max(
        (float((a - b).abs().max() / b.abs().max().clamp_min(1e-6)) for a, b in zip(found, expected, strict=True)),
        default=float("inf"),
    )
    return "ok" if off <= NEAR else f"WRONG: off by {off:.1e}"


def main() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    answers = sys.stdout
    sys.stdout = sys.stderr
    for line in sys.stdin:
        job = json.loads(line)
        folder = Path(job["folder"])
        inputs = torch.load(folder / "inputs.pt")
        found = {step: check(job["class"], folder / step, inputs) for step in job["steps"]}
        assert not any(name.split(".")[0] == "hf_shrink" for name in sys.modules)
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
