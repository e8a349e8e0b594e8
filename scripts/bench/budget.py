"""What one budget over bits, width and depth buys SmolLM2-135M, beside uniform bits, pruning alone and AutoScheme.

    python scripts/bench/budget.py --data ../shared/data --model MODEL
    python scripts/bench/budget.py ... --only ours uniform:22%
    python scripts/bench/budget.py ... --only none      # run nothing, print the table

Protocol: as of quality.py: the float32 model, stored in bfloat16 where it is not quantized; 128 x 512 consecutive
tokens of emma.txt to calibrate, 40 x 512 held out of mansfieldpark.txt and of Shakespeare's tragedies. Budgets are 22,
30 and 45% of the model's bytes in bfloat16. At each:
- ours: `budget: {bytes: ...}`, no other choice made by hand;
- uniform: the most bits, alike for all blocks, that fit with the embedding in at least as many; the same quantizer;
- pruned: heads and channels pruned by obs as far as everything in 8 bits fits;
- autoscheme: AutoRound's search over mixed bits at the average bits that the budget leaves to the blocks. It leaves the
  embedding in float32, far above the budget: we round that as in `uniform`, and give its figures without this too.
Then, once: how well predictions order 30 random plans (predictions), and how long a second budget takes (again).
Every variant runs in a process of its own, one after the other; nothing else should run on the machine. The results
file is written after every variant, and a later run does only what is missing or named by --rerun.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from budget_figures import show, summarise
from common import RESULTS, ROOT, about, folder_bytes, run_fresh
from peers import HELD_OUT_WINDOWS, installed_versions
from store import OtherProtocol, Store, fingerprint
from texts import write_plays

CALIBRATION, HELD_OUT, LENGTH, GROUP = "emma.txt", "mansfieldpark.txt", 512, 64
CACHE = ROOT / ".cache" / "bench"
BITS = [2, 3, 4, 5, 6, 8]  # that the search may give
NONE = "none"
HERE = Path(__file__).resolve().parent
# Of SmolLM2-135M: matrices in the blocks, the embedding (which the output head shares), and norms.
IN_BLOCKS, EMBEDDING, NORMS = 106_168_320, 28_311_552, 35_136
SCALE_BYTES = 2
TABLE = ("model.embed_tokens", "lm_head")


@dataclass(frozen=True)
class Variant:
    """One measured process.

    Attributes:
        kind: "dense", "ours", "rival" or "job".
        point: the budget as a share of the bfloat16 bytes, such as "30%".
        recipe: None for the dense model and the peer.
        bits: AutoScheme's average.
    """

    name: str
    kind: str
    point: str | None = None
    recipe: Mapping[str, Any] | None = None
    bits: float | None = None
    budget: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return self.name if self.point is None else f"{self.name}:{self.point}"


def stored(count: int, bits: int) -> float:
    """Bytes of so many weights in groups, with scales and (in 2 bits) zero points."""
    return count * (bits / 8 + (SCALE_BYTES + (bits / 8 if bits == 2 else 0)) / GROUP)


def uniform_bits(budget: int) -> tuple[int, int]:
    """The most bits for the blocks, and then for the embedding, of at least as many, that fit."""
    room = budget * 0.998 - 2 * NORMS  # headers and shapes
    pairs = [
        (blocks, embedding)
        for blocks in range(2, 9)
        for embedding in range(blocks, 9)
        if stored(IN_BLOCKS, blocks) + stored(EMBEDDING, embedding) <= room
    ]
    if not pairs:
        raise ValueError(f"not even 2 bits everywhere fit in {budget} bytes")
    return max(pairs)


def form(bits: int) -> dict[str, Any]:
    """Two bits have zero points."""
    return {"scheme": f"W{bits}A16", "group_size": GROUP, "symmetric": bits > 2}


def quantized(blocks: int, embedding: int, effort: str) -> dict[str, Any]:
    """A quantize step."""
    outer = dict.fromkeys(TABLE, form(embedding))
    return {"quantize": {"effort": effort, **form(blocks), "overrides": outer}}


def variants(shares: Iterable[float], bf16: int, minutes: float, effort: str) -> list[Variant]:
    """The dense model, everything at each budget, and the two jobs."""
    found = [Variant("dense", "dense")]
    common = {"portable": False, "dtype": "bfloat16"}
    search = {"bits": BITS, "group_size": GROUP, "effort": effort, "minutes": minutes}
    recipes = {}
    for share in shares:
        point, budget = f"{share:.0%}", int(share * bf16)
        blocks, embedding = uniform_bits(budget)
        recipes[point] = {**common, "budget": {"bytes": budget}, "search": search}
        found.append(Variant("ours", "ours", point, recipes[point], budget=budget))
        steps = [quantized(blocks, embedding, effort)]
        bits = {"bits": [blocks, embedding]}
        found.append(Variant("uniform", "rival", point, {**common, "steps": steps}, budget=budget, extra=bits))
        left = (budget * 0.998 - 2 * NORMS - stored(EMBEDDING, 8)) / stored(IN_BLOCKS, 8)
        prune = {"prune": {"what": "width", "method": "obs", "ratio": round(1.005 - left, 4)}}
        steps = [prune, quantized(8, 8, effort)]
        found.append(Variant("pruned", "rival", point, {**common, "steps": steps}, budget=budget))
        average = 8 * (budget - stored(EMBEDDING, embedding) - 2 * NORMS) / IN_BLOCKS
        found.append(
            Variant("autoscheme", "rival", point, bits=round(average, 3), budget=budget, extra={"table": embedding})
        )
    middle = recipes[sorted(recipes)[len(recipes) // 2]]
    return [*found, Variant("predictions", "job", recipe=middle), Variant("again", "job", recipe=middle)]


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help=f"folder with {CALIBRATION} and {HELD_OUT}")
    add("--model", type=Path, required=True, help="float32 safetensors folder (scripts/fetch_demo_model.py makes one)")
    add("--shares", nargs="+", type=float, default=[0.22, 0.3, 0.45], help="of the bytes in bfloat16")
    add("--minutes", type=float, default=10, help="of the refinement of each of our plans")
    add("--effort", default="balanced", help="of ours, uniform and pruned alike (default: balanced)")
    add("--iterations", type=int, default=200, help="AutoRound's steps (default: its own)")
    add("--samples", type=int, default=128, help="calibration windows")
    add("--threads", type=int, default=2)
    add("--device", default="cpu", help="where ours, uniform and pruned are made and measured (default: cpu)")
    add("--seed", type=int, default=0)
    add("--peers-home", type=Path, default=Path("~/.peers"), help="folder of the peers' environments")
    add("--only", nargs="+", metavar="NAME", help=f"ids such as ours:30%%, what is before the colon, globs, or {NONE}")
    add("--rerun", nargs="+", default=[], metavar="NAME", help="measure these again")
    add("--dry-run", action="store_true", help="say what would run, and run nothing")
    add("--output", type=Path, default=RESULTS / "budget.json", help="results file, taken up where it is there")
    return parser.parse_args(words)


def chosen(every: Sequence[Variant], done: Mapping[str, Any], only: Sequence[str] | None, rerun: Sequence[str]) -> Any:
    """What is still to be measured, the dense model first. Raises ValueError for a name that means nothing."""

    def meant(names: Iterable[str]) -> set[str]:
        found: set[str] = set()
        for name in names:
            ids = {v.id for v in every if any(fnmatchcase(part, name) for part in (v.id, v.name, v.point or ""))}
            if not ids:
                raise ValueError(f"{name!r} names no variant; there are: {', '.join(v.id for v in every)}")
            found |= ids
        return found

    wanted = {v.id for v in every} if only is None else {"dense"} | meant(only) if only != [NONE] else set()
    again = meant(rerun)
    return [v for v in every if v.id in again or (v.id in wanted and v.id not in done)]


def run(a: argparse.Namespace, variant: Variant, held_out: Sequence[Path], bf16: int) -> dict[str, Any]:
    """Measure one variant in a process of its own."""
    recipe = dict(variant.recipe or {})
    if variant.recipe is not None:
        recipe["calibration"] = {"samples": a.samples, "length": LENGTH}
    job = {
        "kind": variant.name,
        "model": str(a.model),
        "recipe": recipe or None,
        "calibration": str(a.data / CALIBRATION),
        "held_out": [str(path) for path in held_out],
        "samples": a.samples,
        "held_out_samples": HELD_OUT_WINDOWS,
        "length": LENGTH,
        "threads": a.threads,
        "device": a.device,
        "seed": a.seed,
        "bits": variant.bits,
        "iterations": a.iterations,
        "bf16_bytes": bf16,
    }
    described = about()
    if variant.name == "autoscheme":
        python = a.peers_home.expanduser() / "autoround" / "bin" / "python"
        if not python.is_file():
            raise RuntimeError(f"autoscheme is left out: {python} is not installed")
        described["versions"] = installed_versions(python, ["auto-round"])
        measured = autoscheme(a, python, job, variant.extra["table"])
    else:
        script = "budget_job.py" if variant.kind == "job" else "ours.py"
        measured = run_fresh([sys.executable, str(HERE / script), json.dumps(job)], a.threads)
    return {
        "variant": variant.id,
        "kind": variant.kind,
        "point": variant.point,
        "budget_bytes": variant.budget,
        "recipe": job["recipe"],
        **variant.extra,
        **measured,
        "about": described,
    }


def autoscheme(a: argparse.Namespace, python: Path, job: Mapping[str, Any], table: int) -> dict[str, Any]:
    """The peer's blocks, with its dense embedding and with our embedding of so many bits."""
    step = {"quantize": {"effort": a.effort, "targets": list(TABLE), "ignore": [], **form(table)}}
    recipe = {"portable": False, "steps": [step], "calibration": {"samples": a.samples, "length": LENGTH}}
    with tempfile.TemporaryDirectory() as folder:
        theirs = run_fresh([str(python), str(HERE / "autoscheme.py"), json.dumps({**job, "output": folder})], a.threads)
        rounded = {**job, "kind": "ours", "model": folder, "recipe": recipe}
        small = run_fresh([sys.executable, str(HERE / "ours.py"), json.dumps(rounded)], a.threads)
    return {
        **theirs,
        "folder_bytes": theirs["weight_bytes"],
        "weight_bytes": int(theirs["weight_bytes"] - 4 * EMBEDDING + stored(EMBEDDING, table)),
        "perplexity": small["perplexity"],
        "perplexity_with_a_dense_table": theirs["perplexity"],
    }


def main(words: Sequence[str] | None = None) -> int:
    a = arguments(words)
    held_out = (a.data / HELD_OUT, write_plays(CACHE / "plays.txt"))
    bf16 = folder_bytes(a.model) // 2
    # Sensitivities are kept from one budget to the next; the job `again` keeps none.
    os.environ["HF_SHRINK_CACHE"] = str(CACHE / "budget")
    protocol = {
        "model": {"sha256": fingerprint(*sorted(a.model.glob("*.safetensors")))},
        "calibration": {"text": CALIBRATION, "sha256": fingerprint(a.data / CALIBRATION), "windows": a.samples},
        "held_out": {path.stem: {"sha256": fingerprint(path), "windows": HELD_OUT_WINDOWS} for path in held_out},
        "length": LENGTH,
        "group": GROUP,
        "bf16_bytes": bf16,
        "minutes": a.minutes,
        "effort": a.effort,
        "iterations": a.iterations,
        "threads": a.threads,
        "seed": a.seed,
    }
    try:
        store = Store(a.output, protocol)
        waiting = chosen(variants(a.shares, bf16, a.minutes, a.effort), store.results, a.only, a.rerun)
    except (OtherProtocol, ValueError) as error:
        print(f"budget.py: {error}", file=sys.stderr)
        return 2
    failed = False
    for number, variant in enumerate(waiting, 1):
        print(f"{number}/{len(waiting)} {variant.id} ...", file=sys.stderr, flush=True)
        if a.dry_run:
            continue
        try:
            store.add(run(a, variant, held_out, bf16))
        except RuntimeError as error:
            print(error, file=sys.stderr)
            failed = True
            continue
        store.write(summarise(store.results))
    show(store.results, summarise(store.results))
    print(a.output)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
