"""How fast compressed models run beside the dense ones, other tools and llama.cpp, on SmolLM2-135M and a 1B model.

    python scripts/bench/speed.py                                        # ours against the dense models
    python scripts/bench/speed.py --peers-dir ../shared/peers            # and the tools installed below --peers-home
    python scripts/bench/speed.py ... --subjects smollm2-135m --only ours torchao-int4
    python scripts/bench/speed.py ... --dry-run                          # what is still missing
    python scripts/bench/speed.py ... --only none                        # run nothing, print the table

Protocol: batch 1, a prompt of 64 tokens, then 128 new ones, greedily; prefill is a prompt of 512 tokens to its first
token. Decoding counts the tokens after the first. The dense model (float32, bfloat16) and ours (plain, and compiled)
share a process and run in turn, which is `hf-shrink bench --compile`; every other tool has a process of its own, and
all processes are started one after the other, several rounds of them. Wall and CPU seconds; medians over all runs of
all rounds. Memory is resident bytes over the process with its libraries imported. Nothing else should run meanwhile.

Ours has 4 bits in the blocks and 8 in the output head. The 1B model has random weights, which change no time. Models
are made in .cache/bench, once. Every finished process is in the results file at once, and a later run does only what
is missing or named by --rerun. A file that was measured with another protocol is refused.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import RESULTS, ROOT, about, folder_bytes, run_fresh
from peers import installed_versions
from speed_models import SEED, prepare
from speed_table import show
from speed_targets import summarise
from speed_variants import LLAMA_CPP, OURS, OURS_NAMES, PEERS, SUBJECTS, TOOLS, Tool, variant_id, variants_of
from store import OtherProtocol, Store, fingerprint

HERE = Path(__file__).resolve().parent
CACHE = ROOT / ".cache" / "bench"
NONE = "none"  # --only none


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS), metavar="NAME", help="which models")
    add("--peers-dir", type=Path, help="folder of the peers' setup.sh; without it the peers are left out")
    add("--peers-home", type=Path, default=Path("~/.peers"), help="folder of their environments")
    add("--prompt", type=int, default=64)
    add("--new", type=int, default=128)
    add("--prefill", type=int, default=512)
    add("--rounds", type=int, help="of all processes (default: by model)")
    add("--repeats", type=int, help="in each process (default: by model)")
    add("--threads", type=int, default=2)
    add("--device", default="cpu", help="of the dense model and ours; the others run on the CPU only")
    add("--only", nargs="+", choices=[*TOOLS, NONE], metavar="NAME", help=f"of the processes, only these, or {NONE}")
    add("--rerun", nargs="+", choices=TOOLS, default=[], metavar="NAME", help="measure these again")
    add("--dry-run", action="store_true", help="say what would run, and run nothing")
    add("--cache", type=Path, default=CACHE, help="where the models are made")
    add("--output", type=Path, default=RESULTS / "speed.json", help="results file, taken up where it is there")
    a = parser.parse_args(words)
    if a.device != "cpu" and a.peers_dir is not None:
        parser.error("the peers are measured on the CPU only; leave out --peers-dir, or --device")
    return a


def python_of(a: argparse.Namespace, tool: Tool) -> Path:
    if not tool.environment:
        return Path(sys.executable)
    return Path(a.peers_home).expanduser() / tool.environment / "bin" / "python"


def job_of(a: argparse.Namespace, subject: str, tool: Tool) -> dict[str, Any]:
    """What the worker is told."""
    chosen = SUBJECTS[subject]
    job = {
        "threads": a.threads,
        "prompt": a.prompt,
        "new": a.new,
        "prefill": a.prefill,
        "repeats": a.repeats or chosen.repeats,
    }
    if tool.kind == "ours":
        folders = {"folder": prepare(subject, "ours", a.cache), "dense": prepare(subject, "dense", a.cache)}
        return {**job, **{name: str(path) for name, path in folders.items()}, "device": a.device, "compiled": True}
    read = str(prepare(subject, tool.reads, a.cache))
    if tool.kind == "llama.cpp":
        return {**job, "file": read}
    return {**job, "folder": read, "tool": tool.name, "group": chosen.group, "compiled": tool.compiled}


WORKERS = {"ours": "speed_ours.py", "peer": "speed_peers.py", "llama.cpp": "speed_llama.py"}


def run(a: argparse.Namespace, subject: str, tool: Tool) -> dict[str, dict[str, Any]]:
    """One process; its figures by variant id. Raises RuntimeError where it fails."""
    job = job_of(a, subject, tool)
    printed = run_fresh([str(python_of(a, tool)), str(HERE / WORKERS[tool.kind]), json.dumps(job)], a.threads)
    if tool.kind != "ours":
        return {variant_id(subject, tool.name): printed}
    lost = [note for note in printed["notes"] if "not measured" in note]
    if lost:
        raise RuntimeError(f"{subject}: {'; '.join(lost)}")
    return {
        variant_id(subject, OURS_NAMES[name]): {**found, "threads": printed["threads"]}
        for name, found in printed["models"].items()
    }


def keep(a: argparse.Namespace, store: Store, subject: str, tool: Tool) -> None:
    """Measure one process once more and write what all its rounds give."""
    described = about()  # of what starts now, whatever is committed while it runs
    if tool.environment:
        described["versions"] = installed_versions(python_of(a, tool), tool.packages)
    found = run(a, subject, tool)
    for name, kind in variants_of(tool):
        variant = variant_id(subject, name)
        before = store.results.get(variant, {"rounds": []})
        measured = found[variant]
        result = {
            "variant": variant,
            "subject": subject,
            "name": name,
            "kind": kind,
            "compiled": tool.compiled or name.endswith("-compiled"),
            "threads": measured.pop("threads"),
            "rounds": [*before["rounds"], measured],
            "about": described,
        }
        if kind == "ours":
            result["packed_bytes"] = folder_bytes(prepare(subject, "ours", a.cache))
        store.add(result)
    store.write(summarise(store.results))


def rounds_done(store: Store, subject: str, tool: Tool) -> int:
    ids = [variant_id(subject, name) for name, _ in variants_of(tool)]
    return min(len(store.results[i]["rounds"]) if i in store.results else 0 for i in ids)


def protocol_of(a: argparse.Namespace) -> dict[str, Any]:
    """All that must be equal for two figures to be compared."""
    return {
        "models": {s: {"config": fingerprint(prepare(s, "dense", a.cache) / "config.json")} for s in SUBJECTS},
        "tokens": {"prompt": a.prompt, "new": a.new, "prefill": a.prefill},
        "batch": 1,
        "threads": a.threads,
        "device": a.device,
        "seed": SEED,
    }


def main(words: Sequence[str] | None = None) -> int:
    a = arguments(words)
    tools = [OURS, *(PEERS + LLAMA_CPP if a.peers_dir is not None else ())]
    try:
        store = Store(a.output, protocol_of(a))
    except OtherProtocol as error:
        print(f"speed.py: {error}", file=sys.stderr)
        return 2
    not_run = {}
    for tool in tools:
        if not python_of(a, tool).is_file():
            not_run[tool.name] = f"not installed: bash {a.peers_dir / 'setup.sh'} {tool.environment}"
    only = [name for name in a.only if name != NONE] if a.only is not None else list(TOOLS)
    tools = [tool for tool in tools if tool.name not in not_run and tool.name in {*only, *a.rerun}]
    for subject in a.subjects:
        for tool in tools:
            if tool.name in a.rerun and not a.dry_run:
                for name, _ in variants_of(tool):
                    store.drop(variant_id(subject, name))
    waiting = [
        (number, subject, tool)
        for subject in a.subjects
        for number in range(a.rounds or SUBJECTS[subject].rounds)
        for tool in tools
        if rounds_done(store, subject, tool) <= number
    ]
    for number, subject, tool in waiting if a.dry_run else ():
        print(f"round {number + 1} {variant_id(subject, tool.name)}")
    if not a.dry_run:
        not_run |= run_all(a, waiting, store)
    show(store.results, summarise(store.results), not_run)
    print(a.output)
    return int(any(reason.startswith("failed") for reason in not_run.values()))


def run_all(a: argparse.Namespace, waiting: Sequence[tuple[int, str, Tool]], store: Store) -> dict[str, str]:
    """Start one process after the other; returns why some failed. Those are not started again, the others still run."""
    failed: dict[str, str] = {}
    for place, (number, subject, tool) in enumerate(waiting, 1):
        variant = variant_id(subject, tool.name)
        if variant in failed:
            continue
        print(f"{place}/{len(waiting)} {variant}, round {number + 1} ...", file=sys.stderr, flush=True)
        try:
            keep(a, store, subject, tool)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            failed[variant] = "failed; its messages are above"
    return failed


if __name__ == "__main__":
    sys.exit(main())
