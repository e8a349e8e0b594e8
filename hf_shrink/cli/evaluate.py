"""`hf-shrink evaluate`: measure quality."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_shrink.cli.options import Commands, add_common, add_device, check_folder

EXAMPLES = """\
examples:
  hf-shrink evaluate ./small --baseline ./dense --data held_out.txt
  hf-shrink evaluate ./small --baseline ./dense --data held_out.txt --length 1024 --stride 512
  hf-shrink evaluate ./classifier --baseline ./dense --data reviews.jsonl     rows with text, label and perhaps group
  hf-shrink evaluate ./small --recipe multiple-choice --data questions.jsonl  the built-in recipe on rows of yours
  hf-shrink evaluate ./small --data summarisation                             on its own data set, from the Hub
"""


CHANGES = ("samples", "length", "stride")


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="measure a model's quality, beside a dense one if given",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", metavar="DIR", help="folder or Hub id of the model to measure")
    parser.add_argument("--baseline", metavar="DENSE", help="folder or Hub id of the dense model")
    parser.add_argument(
        "--data",
        metavar="SPEC",
        help="'self', an evaluation or data recipe, a .txt, .jsonl, .parquet or .csv file, or a folder of images "
        "(default: the recipe's, else self)",
    )
    parser.add_argument("--recipe", metavar="R", help="what to measure on that data: a built-in name or a YAML file")
    parser.add_argument("--metrics", metavar="A,B", help="metrics by name (default: the recipe's)")
    parser.add_argument("--samples", type=int, metavar="N", help="sequences or rows (default: the recipe's)")
    parser.add_argument("--length", type=int, metavar="N", help="tokens of a sequence (default: the recipe's)")
    parser.add_argument("--stride", type=int, metavar="N", help="tokens between windows of a text that overlap")
    parser.add_argument("--json", metavar="FILE", help="write the figures")
    add_device(parser)
    add_common(parser)
    parser.set_defaults(command=command, shared=True)


def command(options: argparse.Namespace) -> None:
    from hf_shrink.checkpoint.device import chosen_device
    from hf_shrink.checkpoint.measured import fewer_tokens, load_measured
    from hf_shrink.checkpoint.source import load_processing
    from hf_shrink.evaluation import evaluate_model
    from hf_shrink.evaluation.metrics import check_names
    from hf_shrink.reporting import Progress, silence
    from hf_shrink.sharding import ranks

    data, spec = _asked(options)
    metrics = None if options.metrics is None else [name.strip() for name in options.metrics.split(",") if name.strip()]
    check_names(metrics or ())
    if options.json:
        check_folder(options.json)
    with silence(), Progress(quiet=options.quiet) as progress:
        device = str(chosen_device(options.device))
        measured = load_measured(options.directory, device=device)
        dense = load_measured(options.baseline, device=device) if options.baseline else None
        result = evaluate_model(
            measured.model,
            data,
            baseline=dense.model if dense is not None else None,
            baseline_tokenizer=load_processing(dense.source) if dense is not None and fewer_tokens(measured) else None,
            metrics=metrics,
            tokenizer=load_processing(measured.source),
            spec=spec,
            seed=options.seed,
            progress=progress,
        )
    if not ranks().first:
        return
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")
    _show(result)


def _asked(options: argparse.Namespace) -> tuple[Any, Any]:
    """The data and what is to be done with it: `data` and `spec` of `evaluate_model`."""
    from dataclasses import fields, replace

    from hf_shrink.errors import RecipeError
    from hf_shrink.evaluation.recipes import evaluation_spec, recipe_names
    from hf_shrink.recipe import EvaluationSpec
    from hf_shrink.registry import did_you_mean

    source = options.data or "self"
    named = options.recipe is not None and not options.recipe.endswith((".yaml", ".yml"))
    if named and options.recipe not in recipe_names():
        raise RecipeError(
            f"unknown evaluation recipe {options.recipe!r}; {did_you_mean(options.recipe, recipe_names())}"
        )
    spec = evaluation_spec(options.recipe or source)
    changes = {key: value for key in CHANGES if (value := getattr(options, key)) is not None}
    for key in changes:
        if key not in [field.name for field in fields(spec)]:
            raise RecipeError(f"--{key} is about windows of text, and {options.recipe or source} is about rows")
    changed = replace(spec, **changes)
    if options.recipe is not None and options.data is not None:
        return source, changed
    if options.recipe is None and isinstance(spec, EvaluationSpec) and spec.data == source:
        # Rows of the user's own are measured whole, unless something else is said: only what was given goes on.
        return source, changes or None
    return changed, None


def _show(result: Mapping[str, Any]) -> None:
    for side in ("baseline", "model"):
        for metric, value in result.get(side, {}).items():
            print(f"{side:<9} {metric:<20} {_figure(value)}")
    for metric, found in result.get("groups", {}).items():
        worst = found["by_group"][found["worst"]]
        print(f"{'group':<9} {metric:<20} {_figure(worst['model'])}: worst, {found['worst']} ({worst['rows']} rows)")
    for metric, reason in result["skipped"].items():
        print(f"skipped   {metric:<20} {reason}")
    if not result["context"]:
        print(f"{result['task']} on {result['sequences']} rows of {result['data']}")
        return
    windows = "" if result["stride"] is None else f", stride {result['stride']}"
    print(f"on {result['tokens']} tokens of {result['data']}, context {result['context']}{windows}")


def _figure(value: Mapping[str, float]) -> str:
    interval = "" if value["low"] is None else f"  ({value['low']:.6g} to {value['high']:.6g})"
    return f"{value['value']:.6g}{interval}"
