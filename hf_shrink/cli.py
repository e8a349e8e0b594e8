"""`hf-shrink`: thin commands over the functions of the package.

Exit codes: 0 done, 2 bad input (one line on stderr, nothing written), 1 failure while running.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from hf_shrink.errors import ShrinkError

EXAMPLES = """\
examples:
  hf-shrink run ./my-model --output ./my-model-w4
  hf-shrink run ./my-model --effort best --output ./my-model-w4
  hf-shrink run ./my-model --recipe prune20-w4a16 --calibration notes.txt --output ./small
  hf-shrink run ./my-model --set quantize.group_size=64 --set calibration.samples=64 --output ./small
  hf-shrink inspect ./my-model          what it is made of, and what can be pruned
  hf-shrink plan ./my-model --recipe prune-width --json plan.json
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
        print(f"hf-shrink: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("hf-shrink: interrupted; nothing was left half-written", file=sys.stderr)
        return 1
    except (OSError, RuntimeError, MemoryError) as error:
        print(f"hf-shrink: failed while running: {type(error).__name__}: {_one_line(error)}", file=sys.stderr)
        return 1
    return 0


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="hf-shrink",
        description="Make a Hugging Face model smaller: few-bit weights, structural pruning, or both.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)

    run = commands.add_parser("run", help="shrink a model into a new folder and measure the result")
    _add_source(run)
    _add_recipe(run)
    run.add_argument("--output", required=True, metavar="DIR", help="new folder for the result")
    run.add_argument("--overwrite", action="store_true", help="replace the output folder once the new one is whole")
    run.add_argument(
        "--evaluation", metavar="SPEC", help="what to measure on: 'self', a data recipe, a file, or 'none'"
    )
    run.set_defaults(command=_run)

    plan = commands.add_parser("plan", help="say what run would do, without doing it")
    _add_source(plan)
    _add_recipe(plan)
    plan.add_argument("--json", metavar="FILE", help="write the plan; run takes it as --recipe")
    plan.set_defaults(command=_plan)

    inspect = commands.add_parser("inspect", help="what a model is made of, its bytes, and what can be pruned")
    _add_source(inspect)
    inspect.set_defaults(command=_inspect)

    evaluate = commands.add_parser("evaluate", help="measure a model, beside a dense one if given")
    evaluate.add_argument("directory", metavar="DIR", help="folder or Hub id of the model to measure")
    evaluate.add_argument("--baseline", metavar="DENSE", help="folder or Hub id of the dense model")
    evaluate.add_argument(
        "--data", default="self", metavar="SPEC", help="'self', a data recipe, or a file (default: self)"
    )
    evaluate.add_argument("--samples", type=int, metavar="N", help="sequences (default: the recipe's)")
    evaluate.add_argument("--length", type=int, metavar="N", help="tokens of a sequence (default: the recipe's)")
    evaluate.add_argument("--json", metavar="FILE", help="write the figures")
    _add_common(evaluate)
    evaluate.set_defaults(command=_evaluate)

    report = commands.add_parser("report", help="print the table of a shrunken model and write its report again")
    report.add_argument("directory", metavar="DIR", help="output folder of a run")
    report.set_defaults(command=_report)

    recipes = commands.add_parser("recipes", help="list the built-in recipes")
    recipes.set_defaults(command=_recipes)
    return parser


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="folder or Hub id of a dense model in safetensors")


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", metavar="R", help="built-in name, YAML file, or plan JSON file (default: w4a16)")
    parser.add_argument(
        "--effort", metavar="LEVEL", help="how much work quantization may be: fast (no data), balanced or best"
    )
    parser.add_argument("--calibration", metavar="SPEC", help="'self', a data recipe, or a .txt/.jsonl/.parquet file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a recipe's value; may be repeated"
    )
    _add_common(parser)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of everything random (default: 0)")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def _recipe_of(options: argparse.Namespace) -> Any:
    """The recipe with the command line's changes, or the plan in a JSON file."""
    from dataclasses import replace

    from hf_shrink.errors import RecipeError
    from hf_shrink.pipeline.recipes import DEFAULT_RECIPE, check_methods, load_recipe
    from hf_shrink.plan import Plan

    name = options.recipe or DEFAULT_RECIPE
    if str(name).endswith(".json"):
        if not Path(name).is_file():
            raise RecipeError(f"there is no plan file {name}")
        if options.set or options.effort:
            raise RecipeError("--set and --effort change a recipe, not a plan; leave them out or give the recipe")
        return Plan.from_json(Path(name))
    recipe = load_recipe(name)
    if options.effort is not None:
        if recipe.quantize is None:
            raise RecipeError(f"--effort is about quantization, and the recipe {recipe.name} has no quantize step")
        recipe = recipe.with_overrides([f"quantize.effort={options.effort}"])
    recipe = recipe.with_overrides(options.set)
    evaluation = getattr(options, "evaluation", None)
    if evaluation == "none":
        recipe = replace(recipe, evaluation=replace(recipe.evaluation, metrics=()))
    elif evaluation is not None:
        recipe = replace(recipe, evaluation=replace(recipe.evaluation, data=evaluation))
    check_methods(recipe)
    return recipe


def _run(options: argparse.Namespace) -> None:
    from hf_shrink.pipeline import shrink_checkpoint
    from hf_shrink.reporting import print_table

    report = shrink_checkpoint(
        options.source,
        options.output,
        _recipe_of(options),
        calibration=options.calibration,
        seed=options.seed,
        overwrite=options.overwrite,
        progress=not options.quiet,
    )
    print_table(report, title=f"{options.source} -> {options.output}")
    for note in report.notes:
        print(f"note: {note}")
    for reason in report.not_portable_because:
        print(f"not portable: {reason} (load it after `import hf_shrink`)")
    if report.completions:
        print(f"\nprompt:     {report.completions['prompt']}")
        for name in ("dense", "compressed"):
            print(f"{name + ':':<12}{_one_line(ValueError(report.completions[name]))}")
    print(f"\n{Path(options.output).resolve()}")


def _plan(options: argparse.Namespace) -> None:
    from hf_shrink.checkpoint.source import load_processing, load_source_model, open_source
    from hf_shrink.errors import RecipeError
    from hf_shrink.pipeline import make_plan
    from hf_shrink.plan import Plan
    from hf_shrink.reporting import silence

    recipe = _recipe_of(options)
    if isinstance(recipe, Plan):
        raise RecipeError(f"{options.recipe} is a plan already")
    with silence():
        source = open_source(options.source)
        model, processing = load_source_model(source), load_processing(source)
    plan = make_plan(
        model,
        recipe,
        tokenizer=processing,
        calibration=options.calibration,
        seed=options.seed,
        progress=not options.quiet,
    )
    if options.json:
        plan.to_json(options.json)
    print(plan.summary())


def _inspect(options: argparse.Namespace) -> None:
    from hf_shrink.architectures.inspect import describe
    from hf_shrink.checkpoint.measured import source_skeleton
    from hf_shrink.checkpoint.source import open_source
    from hf_shrink.reporting import silence

    with silence():
        description = describe(source_skeleton(open_source(options.source)))
    print(description.to_text())


def _evaluate(options: argparse.Namespace) -> None:
    from dataclasses import replace

    from hf_shrink.checkpoint.measured import fewer_tokens, load_measured
    from hf_shrink.checkpoint.source import load_processing
    from hf_shrink.evaluation import evaluate_model
    from hf_shrink.evaluation.recipes import evaluation_spec
    from hf_shrink.reporting import Progress, silence

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
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")
    for side in ("baseline", "model"):
        for metric, value in result.get(side, {}).items():
            interval = "" if value["low"] is None else f"  ({value['low']:.6g} to {value['high']:.6g})"
            print(f"{side:<9} {metric:<16} {value['value']:.6g}{interval}")
    for metric, reason in result["skipped"].items():
        print(f"skipped   {metric:<16} {reason}")
    print(f"on {result['tokens']} tokens of {result['data']}, context {result['context']}")


def _report(options: argparse.Namespace) -> None:
    from hf_shrink.checkpoint.record import RECORD_NAME, read_record
    from hf_shrink.errors import CheckpointError
    from hf_shrink.reporting import print_table, write_report

    folder = Path(options.directory)
    if not (folder / RECORD_NAME).is_file():
        raise CheckpointError(f"{folder} has no {RECORD_NAME}; give the output folder of an hf-shrink run")
    record = read_record(folder / RECORD_NAME)
    for path in write_report(folder, record):
        print(path)
    print_table(record.report, title=str(folder))


def _recipes(options: argparse.Namespace) -> None:
    from hf_shrink.pipeline.recipes import built_in_recipes

    for name, path in built_in_recipes().items():
        first = path.read_text().splitlines()[0].lstrip("# ")
        print(f"{name:<16} {first}")
