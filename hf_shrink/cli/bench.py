"""`hf-shrink bench`: how fast a model runs and what memory it takes, beside the dense model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from hf_shrink.cli.options import Commands, check_folder

DTYPES = ("float32", "bfloat16", "float16")


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure a model's speed and memory, beside the dense one",
        description=(
            "Decoding, time to first token, prefill, resident and peak memory of a checkpoint as from_pretrained loads "
            "it, and of the dense model that it was made from. Runs are in turn; nothing else should run meanwhile."
        ),
    )
    option = parser.add_argument
    option("directory", metavar="DIR", help="folder or Hub id of the model to measure")
    option("--baseline", metavar="DENSE", help="folder or Hub id of the dense model (default: as its shrink.json says)")
    option("--prompt", type=int, default=64, metavar="N", help="tokens of the prompt (default: 64)")
    option("--new", type=int, default=128, metavar="N", help="tokens to decode (default: 128)")
    option("--prefill", type=int, default=512, metavar="N", help="tokens of the long prompt, 0 for none (default: 512)")
    option("--batch", type=int, default=1, metavar="N", help="sequences at once (default: 1)")
    option("--repeats", type=int, default=5, metavar="N", help="timed runs of each model (default: 5)")
    option("--threads", type=_positive, metavar="N", help="of torch, on the CPU (default: torch's own)")
    option("--device", metavar="D", help="cpu, cuda, ... (default: the accelerator if there is one)")
    option("--dtype", choices=("auto", *DTYPES), default="auto", help="of the activations (default: as stored)")
    option(
        "--dense-dtypes",
        nargs="+",
        choices=DTYPES,
        default=["float32", "bfloat16"],
        metavar="D",
        help="of the dense model (default: float32 bfloat16)",
    )
    option("--compile", action="store_true", help="measure with torch.compile as well")
    option("--no-memory", action="store_true", help="leave memory out, for which every model is loaded once more")
    option("--json", metavar="FILE", help="write the figures")
    option("--plot", metavar="FILE", help="draw them (.png, .svg or .pdf; needs matplotlib)")
    option("--quiet", action="store_true", help="no progress")
    parser.set_defaults(command=command)


def command(options: argparse.Namespace) -> None:
    from hf_shrink.evaluation.bench import bench_checkpoint
    from hf_shrink.evaluation.speed import Workload
    from hf_shrink.reporting import Progress, silence
    from hf_shrink.reporting.speed_plot import check_plot, write_speed_plot
    from hf_shrink.reporting.speed_table import print_speed

    workload = Workload(options.prompt, options.new, options.prefill, options.batch, options.repeats)
    for file in filter(None, (options.json, options.plot)):
        check_folder(file)
    if options.plot:
        check_plot(options.plot)
    with silence(), Progress(quiet=options.quiet) as progress:
        report = bench_checkpoint(
            options.directory,
            baseline=options.baseline,
            dtype=options.dtype,
            dense_dtypes=options.dense_dtypes,
            workload=workload,
            compiled=options.compile,
            memory=not options.no_memory,
            device=options.device,
            threads=options.threads,
            progress=progress,
        )
    if options.json:
        Path(options.json).write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
    print_speed(report)
    if options.plot:
        print(write_speed_plot(options.plot, report).resolve())


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value
