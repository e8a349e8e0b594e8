"""`hf-shrink`: thin commands over the functions of the package.

Exit codes: 0 done, 2 bad input (one line on stderr, nothing written), 1 failure while running.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from hf_shrink.cli import bench, evaluate, inspect, plan, recipes, recover, report, run
from hf_shrink.cli.options import one_line
from hf_shrink.errors import ShrinkError

EXAMPLES = """\
examples:
  hf-shrink run ./my-model --output ./my-model-w4
  hf-shrink run ./my-model --effort best --output ./my-model-w4
  hf-shrink run ./my-model --recipe prune20-w4a16 --calibration notes.txt --output ./small
  hf-shrink run ./my-model --set quantize.group_size=64 --set calibration.samples=64 --output ./small
  hf-shrink run ./my-model --budget 30% --output ./small       bits, width and depth where they matter most
  hf-shrink plan ./my-model --sweep 20%,30%,45% --figure front.html
  hf-shrink recover ./small --output ./small-recovered          15 minutes of training against the dense model
  hf-shrink inspect ./my-model          what it is made of, and what can be pruned
  hf-shrink plan ./my-model --recipe prune-width --json plan.json
  hf-shrink bench ./my-model-w4         how fast it runs, and its memory, beside the dense model
  hf-shrink recipes                     the built-in recipes
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
    except ShrinkError as error:
        print(f"hf-shrink: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "hf-shrink: interrupted; nothing was left half-written, and a run goes on when it is started again",
            file=sys.stderr,
        )
        return 1
    except (OSError, RuntimeError, MemoryError) as error:
        print(f"hf-shrink: failed while running: {type(error).__name__}: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="hf-shrink",
        description="Make a Hugging Face model smaller: few-bit weights, structural pruning, or both.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)
    for module in (run, recover, plan, inspect, evaluate, bench, report, recipes):
        module.add(commands)
    return parser
