"""What structural pruning costs SmolLM2-135M without fine-tuning: held-out loss on two texts, and the speed won.

    python scripts/bench/pruning.py --data ../shared/data --peers-dir ../shared/peers
    python scripts/bench/pruning.py ... --only obs:20% block_influence:20% --minutes 5
    python scripts/bench/pruning.py ... --only none      # run nothing, print the table

Protocol: as of quality.py: 128 x 512 consecutive tokens of emma.txt to calibrate, 40 x 512 held out of
mansfieldpark.txt and of Shakespeare's tragedies. 10, 20 and 30% of the blocks' parameters go. Beside ours, in the same
run: wanda's score for whole MLP channels and ShortGPT's block influence, both as published, without refit; and
Torch-Pruning's Taylor on MLP channels. `both` takes half of it as blocks and half by obs, `both-deep` five sixths as
blocks, `both-uneven` lets every block keep other sizes. Speed is that of the pruned and the dense model in turn, in one
process. Every variant runs in a process of its own, one after the other; nothing else should run on the machine. The
results file is written after every variant, and a later run does only what is missing or named by --rerun.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import RESULTS, ROOT, about, run_fresh
from peers import HELD_OUT_WINDOWS, KIB_IN_MB, installed_versions
from pruning_figures import AS_PUBLISHED, show, summarise
from store import OtherProtocol, Store, fingerprint
from texts import write_plays

CALIBRATION, HELD_OUT, LENGTH = "emma.txt", "mansfieldpark.txt", 512
CACHE = ROOT / ".cache" / "bench"
MLP_SHARE, BLOCKS = 0.75, 30  # of SmolLM2-135M; Torch-Pruning's ratio is of the MLPs' parameters
NONE = "none"


@dataclass(frozen=True)
class Variant:
    """One measured process.

    Attributes:
        steps: the recipe's; None for the dense model and the peer.
    """

    name: str
    ratio: float = 0.0
    steps: tuple[Mapping[str, Any], ...] | None = None
    portable: bool = True

    @property
    def id(self) -> str:
        return f"{self.name}:{self.ratio:.0%}" if self.ratio else self.name


def variants(ratios: Iterable[float], minutes: float) -> list[Variant]:
    """The dense model and everything at each ratio."""
    found = [Variant("dense")]
    for ratio in ratios:

        def width(method: str = "obs", share: float = ratio, **more: Any) -> dict[str, Any]:
            return {"prune": {"what": "width", "method": method, "ratio": share, **more}}

        def depth(method: str, share: float = ratio, **more: Any) -> dict[str, Any]:
            return {"prune": {"what": "depth", "method": method, "ratio": share, **more}}

        def rest(first: float, ratio: float = ratio) -> float:
            return (ratio - first) / (1 - first)  # the second step counts what the first one left

        def both(share: float, ratio: float = ratio) -> tuple[dict[str, Any], dict[str, Any]]:
            blocks = int(share * ratio * BLOCKS + 1e-9)
            first = {"prune": {"what": "depth", "method": "kl_greedy", "blocks": blocks}}
            return first, width(share=rest(blocks / BLOCKS, ratio))

        found += [
            Variant("wanda", ratio, (width("wanda", units="mlp", refit=False),)),
            Variant("block_influence", ratio, (depth("block_influence", refit=False),)),
            Variant("torchpruning", ratio),
            Variant("obs", ratio, (width(),)),
            Variant("obs-no-refit", ratio, (width(refit=False),)),
            Variant("obs-uneven", ratio, (width(),), portable=False),
            Variant("kl_greedy", ratio, (depth("kl_greedy"),)),
            Variant("evolve", ratio, (depth("evolve", minutes=minutes),)),
            Variant("evolve-parts", ratio, (depth("evolve", minutes=minutes, parts="any"),), portable=False),
            Variant("both", ratio, both(1 / 2)),
            Variant("both-deep", ratio, both(5 / 6)),
            Variant("both-uneven", ratio, both(1 / 2), portable=False),
            Variant(
                "both-searched",
                ratio,
                (depth("evolve", ratio / 2, minutes=minutes, parts="any"), width(share=rest(ratio / 2))),
                portable=False,
            ),
        ]
    return found


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help=f"folder with {CALIBRATION} and {HELD_OUT}")
    add("--model", type=Path, required=True, help="float32 safetensors folder (scripts/fetch_demo_model.py makes one)")
    add("--ratios", nargs="+", type=float, default=[0.1, 0.2, 0.3])
    add("--minutes", type=float, default=15, help="of evolve's search")
    add("--samples", type=int, default=128, help="calibration windows")
    add("--threads", type=int, default=2)
    add("--seed", type=int, default=0)
    add("--peers-dir", type=Path, help="folder of the peers' run.py; without it Torch-Pruning is left out")
    add("--peers-home", type=Path, default=Path("~/.peers"), help="folder of their environments")
    add(
        "--only",
        nargs="+",
        metavar="NAME",
        help=f"ids such as obs:20%%, what stands before the colon, globs, or {NONE}",
    )
    add("--rerun", nargs="+", default=[], metavar="NAME", help="measure these again")
    add("--output", type=Path, default=RESULTS / "pruning.json", help="results file, taken up where it is there")
    return parser.parse_args(words)


def chosen(a: argparse.Namespace, done: Mapping[str, Any]) -> list[Variant]:
    """What is still to be measured, the dense model first. Raises ValueError for a name that means nothing."""
    every = variants(a.ratios, a.minutes)

    def meant(names: Iterable[str]) -> set[str]:
        found: set[str] = set()
        for name in names:
            ids = {v.id for v in every if any(fnmatchcase(part, name) for part in (v.id, v.name))}
            if not ids:
                raise ValueError(f"{name!r} names no variant; there are: {', '.join(v.id for v in every)}")
            found |= ids
        return found

    if a.only == [NONE]:
        wanted: set[str] = set()
    else:
        wanted = {"dense"} | (meant(a.only) if a.only is not None else {v.id for v in every})
    again = meant(a.rerun)
    return [v for v in every if v.id in again or (v.id in wanted and v.id not in done)]


def run_ours(a: argparse.Namespace, held_out: Sequence[Path], variant: Variant) -> dict[str, Any]:
    recipe = None
    if variant.steps is not None:
        calibration = {"samples": a.samples, "length": LENGTH}
        recipe = {"portable": variant.portable, "calibration": calibration, "steps": list(variant.steps)}
    job = {
        "model": str(a.model),
        "recipe": recipe,
        "calibration": str(a.data / CALIBRATION),
        "held_out": [str(path) for path in held_out],
        "samples": a.samples,
        "held_out_samples": HELD_OUT_WINDOWS,
        "length": LENGTH,
        "threads": a.threads,
        "seed": a.seed,
        "speed": True,
    }
    script = Path(__file__).resolve().parent / "ours.py"
    described = about()
    measured = run_fresh([sys.executable, str(script), json.dumps(job)], a.threads)
    kind = "dense" if recipe is None else "reference" if variant.name in AS_PUBLISHED else "ours"
    return {"variant": variant.id, "name": variant.name, "kind": kind, "recipe": recipe, **measured, "about": described}


def run_peer(a: argparse.Namespace, held_out: Sequence[Path], variant: Variant) -> dict[str, Any]:
    python = a.peers_home.expanduser() / "torchpruning" / "bin" / "python"
    if not python.is_file():
        raise RuntimeError(f"not installed: bash {a.peers_dir / 'setup.sh'} torchpruning")
    described = {**about(), "versions": installed_versions(python, ["torch-pruning"])}
    command = [str(python), str(a.peers_dir / "run.py"), "torchpruning", "--ratio", f"{variant.ratio / MLP_SHARE:.6f}"]
    command += ["--model", str(a.model), "--calibration", str(a.data / CALIBRATION), "--heldout", *map(str, held_out)]
    with tempfile.TemporaryDirectory() as folder:
        command += ["--samples", str(a.samples), "--threads", str(a.threads), "--output", folder]
        printed = run_fresh(command, a.threads)
    return {
        "variant": variant.id,
        "name": variant.name,
        "kind": "reference",
        "seconds_with_loading": printed["seconds"],
        "peak_mb": round(printed["peak_rss_mb"] * KIB_IN_MB, 1),
        "parameters": printed["parameters"],
        "perplexity": {path.stem: printed["perplexity"][path.stem] for path in held_out},
        "threads": printed["threads"],
        "about": described,
    }


def main(words: Sequence[str] | None = None) -> int:
    a = arguments(words)
    held_out = (a.data / HELD_OUT, write_plays(CACHE / "plays.txt"))
    protocol = {
        "model": {"sha256": fingerprint(*sorted(a.model.glob("*.safetensors")))},
        "calibration": {"text": CALIBRATION, "sha256": fingerprint(a.data / CALIBRATION), "windows": a.samples},
        "held_out": {path.stem: {"sha256": fingerprint(path), "windows": HELD_OUT_WINDOWS} for path in held_out},
        "length": LENGTH,
        "threads": a.threads,
        "seed": a.seed,
        "minutes": a.minutes,
    }
    try:
        store = Store(a.output, protocol)
        waiting = chosen(a, store.results)
    except (OtherProtocol, ValueError) as error:
        print(f"pruning.py: {error}", file=sys.stderr)
        return 2
    failed = False
    for number, variant in enumerate(waiting, 1):
        peer = variant.name == "torchpruning"
        if peer and a.peers_dir is None:
            print("torchpruning is left out: --peers-dir names the folder of the peers' run.py", file=sys.stderr)
            continue
        print(f"{number}/{len(waiting)} {variant.id} ...", file=sys.stderr, flush=True)
        try:
            store.add(run_peer(a, held_out, variant) if peer else run_ours(a, held_out, variant))
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
