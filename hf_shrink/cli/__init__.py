"""`hf-shrink`: thin commands over the functions of the package.

Exit codes: 0 done, 2 bad input (one line on stderr; nothing written, but for the plan and the blocks that a run had
finished), 1 failure while running. Of several processes one says what went wrong.
"""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Sequence
from typing import NoReturn

from hf_shrink.cli import bench, evaluate, inspect, plan, push, recipes, recover, report, run
from hf_shrink.cli.options import one_line
from hf_shrink.errors import ShrinkError
from hf_shrink.sharding import Ended, ProcessLost, Ranks, check_started, heeding_the_launcher, launched_first, together

NEXT_STEPS = """\
from a model to a smaller one:
  hf-shrink inspect ./my-model                        what it is made of, and what can be pruned
  hf-shrink plan ./my-model --budget 30%              what would be done, block by block; changes nothing
  hf-shrink run ./my-model --output ./small           do it: 4-bit weights, measured against the dense model
  hf-shrink report ./small                            the figures again; ./small/report.html shows them
  hf-shrink bench ./small                             speed and memory on this machine, beside the dense model
  hf-shrink recover ./small --output ./small-recovered   train it against the dense model for 15 minutes
  hf-shrink push ./small me/my-model-w4               share it

run and plan take the same choices:
  --recipe prune20-w4a16      a built-in recipe (hf-shrink recipes) or a YAML file of yours
  --effort best               or: how much work it may be, fast, balanced or best
  --budget 30%                or: how big it may be (120MB, latency:60%, memory:500MB); a search finds how
  --set quantize.group_size=64 --set calibration.samples=64     change a value of the recipe
  --calibration notes.txt     your own text; without it the model writes some itself

then, in Python (after `import hf_shrink` for speed, or where run said that it is needed):
  AutoModelForCausalLM.from_pretrained("./small")

`hf-shrink COMMAND --help` has every option. A run that was interrupted goes on when it is started again.
Exit codes: 0 done, 2 something to change first (nothing was written; of a run that had begun, its plan and finished
blocks are kept), 1 a failure on the way (what is done is kept).
"""


FULL = (errno.ENOSPC, errno.EDQUOT)  # of a disk, or of what one may have of it


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
    except KeyboardInterrupt as error:
        return 1, str(error) or "interrupted; nothing was left half-written, and a run goes on when it is started again"
    except ProcessLost as error:
        return 1, one_line(error)
    except (OSError, RuntimeError, MemoryError) as error:
        if isinstance(error, OSError) and error.errno in FULL:
            return 1, (
                f"the disk is full ({one_line(error)}); make room: what is finished is kept, and a run goes on when it "
                "is started again"
            )
        return 1, f"failed while running: {type(error).__name__}: {one_line(error)}"
    return 0, ""


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="hf-shrink",
        description="Make a Hugging Face model smaller: few-bit weights, structural pruning, or both.",
        epilog=NEXT_STEPS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)
    for module in (run, plan, inspect, evaluate, recover, bench, report, push, recipes):
        module.add(commands)
    return parser
