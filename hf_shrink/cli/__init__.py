"""`hf-shrink`: thin commands over the functions of the package.

Exit codes: 0 done, 2 bad input (one line on stderr, nothing written), 1 failure while running. Of several processes one
says what went wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from hf_shrink.cli import bench, evaluate, inspect, plan, recipes, report, run
from hf_shrink.cli.options import one_line
from hf_shrink.errors import ShrinkError
from hf_shrink.sharding import Ended, ProcessLost, Ranks, check_started, heeding_the_launcher, launched_first, together

EXAMPLES = """\
examples:
  hf-shrink run ./my-model --output ./my-model-w4
  hf-shrink run ./my-model --effort best --output ./my-model-w4
  hf-shrink run ./my-model --recipe prune20-w4a16 --calibration notes.txt --output ./small
  hf-shrink run ./my-model --set quantize.group_size=64 --set calibration.samples=64 --output ./small
  hf-shrink run ./my-model --budget 30% --output ./small       bits, width and depth where they matter most
  hf-shrink plan ./my-model --sweep 20%,30%,45% --figure front.html
  hf-shrink inspect ./my-model          what it is made of, and what can be pruned
  hf-shrink plan ./my-model --recipe prune-width --json plan.json
  hf-shrink bench ./my-model-w4         how fast it runs, and its memory, beside the dense model
  hf-shrink recipes                     the built-in recipes
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n" if launched_first() else None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        check_started()
    except ShrinkError as error:
        print(f"hf-shrink: {one_line(error)}", file=sys.stderr)
        return 2
    with together() as here, heeding_the_launcher(here):
        code, line = _outcome(options, here)
        if line:
            here.complain(f"hf-shrink: {line}")
        if not code:
            here.leave()
    return code


def _outcome(options: argparse.Namespace, here: Ranks) -> tuple[int, str]:
    """Run a command: its exit code, and what to say of an error. What shares no work is the first process's alone."""
    try:
        if here.first or getattr(options, "shared", False):
            options.command(options)
    except ShrinkError as error:
        return 2, one_line(error)
    except Ended:
        return 1, (
            "ended by the launcher: another process failed, or the launcher was stopped; what is finished is kept, and "
            "a run goes on when it is started again"
        )
    except KeyboardInterrupt:
        return 1, "interrupted; nothing was left half-written, and a run goes on when it is started again"
    except ProcessLost as error:
        return 1, one_line(error)
    except (OSError, RuntimeError, MemoryError) as error:
        return 1, f"failed while running: {type(error).__name__}: {one_line(error)}"
    return 0, ""


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="hf-shrink",
        description="Make a Hugging Face model smaller: few-bit weights, structural pruning, or both.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)
    for module in (run, plan, inspect, evaluate, bench, report, recipes):
        module.add(commands)
    return parser
