"""`hf-shrink run`: shrink a model into a new folder and measure the result."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_shrink.cli.options import (
    Commands,
    add_device,
    add_evaluation,
    add_memory,
    add_recipe,
    add_source,
    check_folder,
    evaluation_of,
    one_line,
    recipe_of,
)
from hf_shrink.cli.push import add_private
from hf_shrink.cli.recover import recovering
from hf_shrink.errors import ShrinkError

if TYPE_CHECKING:
    from hf_shrink.hub import Destination


def add(commands: Commands) -> None:
    parser = commands.add_parser("run", help="shrink a model into a new folder and measure the result")
    add_source(parser)
    add_recipe(parser)
    parser.add_argument("--output", required=True, metavar="DIR", help="new folder for the result")
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder once the new one is whole")
    add_evaluation(parser)
    add_memory(parser)
    add_device(parser)
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on from what an interrupted run with this output has finished (default), or delete that",
    )
    parser.add_argument(
        "--recover",
        type=float,
        metavar="MINUTES",
        help="then train the result against the dense model for so long, as `hf-shrink recover` does",
    )
    parser.add_argument(
        "--push-to-hub", metavar="REPO", help="push the result to OWNER/NAME; whether that may be is asked first"
    )
    add_private(parser)
    parser.add_argument("--log-file", metavar="FILE", help="write progress there, a line now and then, not to stderr")
    parser.set_defaults(command=command, shared=True)


def command(options: argparse.Namespace) -> None:
    from hf_shrink.checkpoint.record import RECORD_NAME
    from hf_shrink.hub import Destination, check_destination
    from hf_shrink.pipeline import shrink_checkpoint
    from hf_shrink.reporting import print_table
    from hf_shrink.sharding import ranks

    if options.log_file:
        check_folder(options.log_file)
    if options.private and not options.push_to_hub:
        raise ShrinkError("--private is about the repository of --push-to-hub; give both, or neither")
    recipe = recipe_of(options)
    destination = None
    if options.push_to_hub:
        wanted = Destination(options.push_to_hub, options.private or None)
        destination = ranks().on_first(lambda: check_destination(wanted, RECORD_NAME))
    recover = None
    if options.recover is not None:
        recover = recovering()
        _check_recovery(recipe, options.recover, ranks().size)
    report = shrink_checkpoint(
        options.source,
        options.output,
        recipe,
        calibration=options.calibration,
        evaluation=evaluation_of(recipe, options.evaluation),
        seed=options.seed,
        overwrite=options.overwrite,
        resume=options.resume,
        max_memory=options.max_memory,
        device=options.device,
        progress=options.log_file or not options.quiet,
    )
    if not ranks().first:
        return
    if recover is not None:
        report = _recovered(recover, options, recipe)
    print_table(report, title=f"{options.source} -> {options.output}")
    for note in report.notes:
        print(f"note: {note}")
    for reason in report.not_portable_because:
        print(f"not portable: {reason} (load it after `import hf_shrink`)")
    for texts in report.completions[:1]:
        print()
        for name in ("prompt", "dense", "compressed"):
            print(f"{name + ':':<12}{one_line(texts[name])}")
    print(f"\n{Path(options.output).resolve()}")
    if destination is not None:
        _push(options.output, destination, options.quiet)


def _check_recovery(recipe: Any, minutes: float, processes: int) -> None:
    """Raises RecipeError for what would be found after the work otherwise."""
    from hf_shrink.errors import RecipeError
    from hf_shrink.plan import Plan
    from hf_shrink.training.recovery import Recovery

    Recovery(minutes=minutes)
    if processes > 1:
        raise RecipeError("--recover trains in one process; run hf-shrink recover on the result of this one")
    if (recipe.vocabulary if isinstance(recipe, Plan) else recipe.prune("vocabulary")) is not None:
        raise RecipeError(
            "a model whose tokens are cut does not predict the dense model's tokens, so it cannot be recovered; "
            "recover it first and prune its vocabulary in a second run"
        )


def _recovered(recover: Any, options: argparse.Namespace, recipe: Any) -> Any:
    """The report of the output folder after it was recovered, in its place, on the data that it was calibrated on.

    Raises KeyboardInterrupt or RecoveryInterrupted that say how to do this part again: the compressed model is whole by
    now.
    """
    from hf_shrink.checkpoint.record import RECORD_NAME, read_record
    from hf_shrink.errors import RecoveryInterrupted
    from hf_shrink.pipeline.recipes import calibration_of

    data = options.calibration or calibration_of(recipe).data
    words = ["hf-shrink", "recover", options.output, "--output", options.output, "--overwrite"]
    words += ["--baseline", options.source, "--data", data, "--minutes", f"{options.recover:g}"]
    words += ["--seed", options.seed] if options.seed else []
    words += ["--device", options.device] if options.device else []
    later = f"{options.output} is whole, but not recovered; go on with: {shlex.join(map(str, words))}"
    try:
        recover(
            options.output,
            options.output,
            baseline=options.source,
            data=data,
            overwrite=True,
            seed=options.seed,
            progress=options.log_file or not options.quiet,
            device=options.device,
            evaluation=evaluation_of(recipe, options.evaluation),
            minutes=options.recover,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {later}") from None
    except (ShrinkError, OSError, RuntimeError, MemoryError) as error:
        kind = "" if isinstance(error, ShrinkError) else f"{type(error).__name__}: "
        raise RecoveryInterrupted(f"{kind}{error} ({later})") from error
    return read_record(Path(options.output) / RECORD_NAME).report


def _push(output: str, destination: Destination, quiet: bool) -> None:
    """Raises PushInterrupted, whatever is in the way: by now, there is something that was computed."""
    from hf_shrink.checkpoint.push import push_folder
    from hf_shrink.errors import HubError, PushInterrupted
    from hf_shrink.reporting import silence

    try:
        with silence(quiet):
            print(push_folder(output, destination).url)
    except HubError as error:
        raise PushInterrupted(
            f"{error} ({output} is whole; push it with: hf-shrink push {shlex.quote(output)} {destination.arguments})"
        ) from error
