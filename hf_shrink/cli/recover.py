"""`hf-shrink recover`: train a compressed model until it is near the dense one again."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hf_shrink.cli.options import Commands, add_common, add_device, add_evaluation, measured_on

METHODS = ("lora", "full", "scales")
MINUTES = 15.0


def add(commands: Commands) -> None:
    parser = commands.add_parser("recover", help="train a compressed model until it is near the dense one again")
    parser.add_argument("directory", metavar="DIR", help="folder of the compressed model")
    parser.add_argument("--baseline", metavar="DENSE", help="the dense model (default: what DIR says it was made from)")
    parser.add_argument("--output", required=True, metavar="DIR", help="new folder for the result")
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder once the new one is whole")
    parser.add_argument(
        "--data", default="self", metavar="SPEC", help="'self', a data recipe, or a .txt/.jsonl/.parquet file"
    )
    parser.add_argument("--method", choices=METHODS, help="default: scales where weights are packed, else lora")
    parser.add_argument("--minutes", type=float, metavar="N", help=f"of training, all included (default: {MINUTES:g})")
    parser.add_argument("--steps", type=int, metavar="N", help="of training, in place of minutes or as a limit beside")
    parser.add_argument("--samples", type=int, metavar="N", help="sequences of the data")
    parser.add_argument("--length", type=int, metavar="N", help="tokens of a sequence")
    parser.add_argument("--rank", type=int, metavar="N", help="of the adapters of method lora")
    parser.add_argument("--learning-rate", type=float, metavar="X")
    parser.add_argument("--task", type=float, metavar="X", help="weight of the text's own next tokens (default: 0)")
    add_evaluation(parser)
    add_device(parser)
    add_common(parser)
    parser.set_defaults(command=command, shared=True)


def command(options: argparse.Namespace) -> None:
    from hf_shrink.sharding import ranks

    recover_checkpoint = recovering()
    names = ("method", "minutes", "steps", "samples", "length", "rank", "learning_rate", "task")
    chosen: dict[str, Any] = {n: getattr(options, n) for n in names if getattr(options, n) is not None}
    if not {"minutes", "steps"} & set(chosen):
        chosen["minutes"] = MINUTES
    result = recover_checkpoint(
        options.directory,
        options.output,
        baseline=options.baseline,
        data=options.data,
        overwrite=options.overwrite,
        seed=options.seed,
        progress=not options.quiet,
        device=options.device,
        evaluation=_evaluation(options),
        **chosen,
    )
    if not ranks().first:
        return
    print(result.note)
    print(f"\n{Path(options.output).resolve()}")


def _evaluation(options: argparse.Namespace) -> Any:
    """What the folder says that was measured, on other data; None where nothing else is asked for."""
    if options.evaluation is None:
        return None
    from hf_shrink.checkpoint.record import RECORD_NAME, read_record
    from hf_shrink.training.recovery.checkpoint import measured_before

    path = Path(options.directory) / RECORD_NAME
    return measured_on(measured_before(read_record(path) if path.is_file() else None), options.evaluation)


def recovering() -> Any:
    """`recover_checkpoint`. Raises ShrinkError where what it needs is not installed."""
    from hf_shrink.errors import ShrinkError

    try:
        from hf_shrink.training.recovery import recover_checkpoint
    except ModuleNotFoundError as error:
        raise ShrinkError(
            f"recovery needs {error.name}, which is not installed; run: pip install 'hf_shrink[training]'"
        ) from error
    return recover_checkpoint
