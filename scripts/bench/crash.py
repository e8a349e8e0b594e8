"""SIGKILL a run at random moments, start it again, and compare what comes out with the uninterrupted run's bytes.

    python scripts/bench/crash.py SOURCE --kills 20 --recipe w4a16 --calibration text.txt

Every attempt is a forked process. The moments are spread evenly over the time that the uninterrupted run took, each
moved at random within its share. A run is killed once and then goes on to its end. Results: results/crash.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from common import write_results

TIMES = ("seconds", "evaluation")  # of a report: they are measured anew


def digests(folder: Path) -> dict[str, str]:
    """Of what a run decides: weights, config, and the record without its times."""
    found = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.suffix == ".safetensors" or path.name in ("config.json", "model.safetensors.index.json")
    }
    record = json.loads((folder / "shrink.json").read_text())
    record["report"] = {key: value for key, value in record["report"].items() if key not in TIMES}
    return {**found, "shrink.json": hashlib.sha256(json.dumps(record).encode()).hexdigest()}


def forked(work: Callable[[], None], kill_after: float | None = None) -> tuple[int, float]:
    """Run `work` in a child; the signal that it died of (0: none) and its seconds. Raises RuntimeError if it fails."""
    since = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:  # the child must never come back into the parent's code
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError("the run failed; see above")
    return (os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0), time.monotonic() - since


def crash(run: Callable[[Path], None], folder: Path, kills: int, seed: int = 0) -> dict[str, Any]:
    """Kill `run`, which writes the folder that it is given, `kills` times, and compare.

    Returns:
        What was killed when, what was finished by then, and whether all results were equal.
    """
    _, seconds = forked(lambda: run(folder / "whole"))
    expected = digests(folder / "whole")
    draw, attempts = random.Random(seed), []
    for number in range(kills):
        out = folder / f"killed-{number}"
        moment, died = (number + draw.random()) / kills * seconds, 0
        while not died:
            died, _ = forked(lambda out=out: run(out), kill_after=moment)  # type: ignore[misc]
            if not died:  # it was faster than the first, and over by then
                moment *= 0.8
                shutil.rmtree(out)
        done = finished(folder / f".{out.name}.partial-run")
        _, again = forked(lambda out=out: run(out))  # type: ignore[misc]
        same = digests(out) == expected
        attempts.append(
            {
                "after": round(moment, 3),
                "killed": died == signal.SIGKILL,
                "finished": done,
                "seconds_to_go_on": round(again, 3),
                "same": same,
            }
        )
        shutil.rmtree(out)
    return {
        "seconds": round(seconds, 3),
        "kills": sum(bool(attempt["killed"]) for attempt in attempts),
        "all_same": all(attempt["same"] for attempt in attempts),
        "left_over": sorted(path.name for path in folder.iterdir() if path.name != "whole"),
        "attempts": attempts,
    }


def finished(partial: Path) -> str:
    """What a killed run's journal says."""
    if not partial.is_dir():
        return "nothing yet"
    path = partial / "journal.json"
    if not path.is_file():
        return "no journal yet"
    entries: Mapping[str, Any] = json.loads(path.read_text())["entries"]
    names = [name for name in ("calibration", "plan") if name in entries]
    log = partial / "finished" / "recalled.jsonl"
    lines = log.read_text().count("\n") if log.is_file() else 0
    return ", ".join([*names, f"{lines} lines of planning and repair", f"{len(entries.get('blocks', {}))} blocks"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--recipe", default="w4a16")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--max-memory", default="0")
    parser.add_argument(
        "--no-page", action="store_true", help="draw no report page, which takes longer than tiny models"
    )
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    from hf_shrink.pipeline import checkpointing, shrink_checkpoint
    from hf_shrink.pipeline.recipes import load_recipe

    recipe = load_recipe(options.recipe).with_overrides([*options.set, "evaluation.metrics=[]"])

    if options.no_page:
        checkpointing.write_report = lambda *given, **named: []

    def run(out: Path) -> None:
        shrink_checkpoint(
            options.source, out, recipe, calibration=options.calibration, max_memory=options.max_memory, progress=False
        )

    with tempfile.TemporaryDirectory() as folder:
        found = crash(run, Path(folder), options.kills)
    print(json.dumps(found, indent=1))
    write_results("crash", {"recipe": options.recipe, "set": options.set, **found}, options.output)
    if not found["all_same"] or found["left_over"]:
        raise SystemExit("a resumed run gave other bytes, or something was left over")


if __name__ == "__main__":
    main()
