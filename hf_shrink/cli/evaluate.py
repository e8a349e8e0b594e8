"""`hf-shrink evaluate`: measure quality."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from hf_shrink.cli.options import Commands, add_common


def add(commands: Commands) -> None:
    parser = commands.add_parser("evaluate", help="measure a model's quality, beside a dense one if given")
    parser.add_argument("directory", metavar="DIR", help="folder or Hub id of the model to measure")
    parser.add_argument("--baseline", metavar="DENSE", help="folder or Hub id of the dense model")
    parser.add_argument(
        "--data", default="self", metavar="SPEC", help="'self', a data recipe, or a file (default: self)"
    )
    parser.add_argument("--samples", type=int, metavar="N", help="sequences (default: the recipe's)")
    parser.add_argument("--length", type=int, metavar="N", help="tokens of a sequence (default: the recipe's)")
    parser.add_argument("--json", metavar="FILE", help="write the figures")
    add_common(parser)
    parser.set_defaults(command=command, shared=True)


def command(options: argparse.Namespace) -> None:
    from dataclasses import replace

    from hf_shrink.checkpoint.measured import fewer_tokens, load_measured
    from hf_shrink.checkpoint.source import load_processing
    from hf_shrink.evaluation import evaluate_model
    from hf_shrink.evaluation.recipes import evaluation_spec
    from hf_shrink.reporting import Progress, silence
    from hf_shrink.sharding import ranks

    spec = evaluation_spec(options.data)
    changes = {key: getattr(options, key) for key in ("samples", "length") if getattr(options, key) is not None}
    spec = replace(spec, **changes)
    with silence(), Progress(quiet=options.quiet) as progress:
        measured = load_measured(options.directory)
        dense = load_measured(options.baseline) if options.baseline else None
        result = evaluate_model(
            measured.model,
            spec,
            baseline=dense.model if dense is not None else None,
            baseline_tokenizer=load_processing(dense.source) if dense is not None and fewer_tokens(measured) else None,
            metrics=spec.metrics,
            tokenizer=load_processing(measured.source),
            seed=options.seed,
            progress=progress,
        )
    if not ranks().first:
        return
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")
    for side in ("baseline", "model"):
        for metric, value in result.get(side, {}).items():
            interval = "" if value["low"] is None else f"  ({value['low']:.6g} to {value['high']:.6g})"
            print(f"{side:<9} {metric:<16} {value['value']:.6g}{interval}")
    for metric, reason in result["skipped"].items():
        print(f"skipped   {metric:<16} {reason}")
    print(f"on {result['tokens']} tokens of {result['data']}, context {result['context']}")
