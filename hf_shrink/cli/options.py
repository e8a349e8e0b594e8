"""Options that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, TypeAlias

from hf_shrink.errors import ShrinkError

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="folder or Hub id of a dense model in safetensors")


def add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--recipe",
        metavar="R",
        help="built-in name, YAML file, plan JSON file, a budget of a sweep (front.json:30%%), or the shrink.json of a "
        "run to do again (default: w4a16)",
    )
    parser.add_argument(
        "--budget",
        action="append",
        default=[],
        metavar="SIZE",
        help="how big or slow the result may be, in place of steps: 30%% (of the dense bytes), 120MB, latency:60%%, "
        "latency:prefill:60%%, memory:500MB, memory:500MB@8192 (with a KV cache of so many tokens); may be repeated",
    )
    parser.add_argument(
        "--effort", metavar="LEVEL", help="how much work quantization may be: fast (no data), balanced or best"
    )
    parser.add_argument("--calibration", metavar="SPEC", help="'self', a data recipe, or a .txt/.jsonl/.parquet file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a recipe's value; may be repeated"
    )
    add_common(parser)


def add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of everything random (default: 0)")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def add_memory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-memory",
        metavar="SIZE",
        default="4GB",
        help="activations beyond it go to a file, and weights stay there unless all fit in half of it (default: 4GB)",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", metavar="D", help="cpu, cuda, cuda:1, ... (default: the accelerator where there is one)"
    )


def add_evaluation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--evaluation", metavar="SPEC", help="what to measure on: 'self', a data recipe, a file, or 'none'"
    )


def recipe_of(options: argparse.Namespace) -> Any:
    """The recipe with the command line's changes, or what a JSON file holds."""
    from dataclasses import replace

    from hf_shrink.errors import RecipeError
    from hf_shrink.pipeline.recipes import BUDGET_RECIPE, DEFAULT_RECIPE, check_methods, load_recipe
    from hf_shrink.plan import Plan
    from hf_shrink.recipe import Budget
    from hf_shrink.recipe.budget import budget_data

    sweep = getattr(options, "sweep", ())
    if sweep and options.budget:
        raise RecipeError(
            "--sweep plans for each of its budgets, and would leave out that of --budget; give one of them"
        )
    budgets = [*options.budget, *sweep[:1]]
    name = options.recipe or (BUDGET_RECIPE if budgets else DEFAULT_RECIPE)
    file, _, point = str(name).partition(".json:")
    as_json = point or file.endswith(".json")
    recipe = _from_json(Path(f"{file}.json" if point else file), point) if as_json else load_recipe(name)
    if isinstance(recipe, Plan):
        if options.set or options.effort or budgets:
            raise RecipeError(
                "--set, --effort and --budget change a recipe, not a plan; leave them out or give the recipe"
            )
        return recipe
    if options.budget or (sweep and not options.recipe):
        if recipe.budget is None:
            raise RecipeError(
                f"--budget leaves it to a search what is done, and the recipe {recipe.name} has steps; leave --recipe "
                f"out or give one with a budget, such as {BUDGET_RECIPE}"
            )
        recipe = replace(recipe, budget=Budget.from_dict(budget_data(budgets)))
    if options.effort is not None and recipe.budget is not None:
        recipe = recipe.with_overrides([f"search.effort={options.effort}"])
    elif options.effort is not None:
        if recipe.quantize is None:
            raise RecipeError(f"--effort is about quantization, and the recipe {recipe.name} has no quantize step")
        recipe = recipe.with_overrides([f"quantize.effort={options.effort}"])
    recipe = recipe.with_overrides(options.set)
    check_methods(recipe)
    return recipe


def evaluation_of(recipe: Any, wanted: str | None) -> Any:
    """What to measure of a recipe or a plan. `wanted`: None, `none`, or where the data is."""
    from hf_shrink.plan import Plan
    from hf_shrink.recipe import EvaluationSpec

    spec = EvaluationSpec() if isinstance(recipe, Plan) else recipe.evaluation
    return spec if wanted is None else measured_on(spec, wanted)


def measured_on(spec: Any, wanted: str) -> Any:
    """An evaluation with other data, or with nothing to measure. `wanted` as in `evaluation_of`."""
    from dataclasses import replace

    from hf_shrink.recipe import EvaluationSpec

    if wanted == "none":
        return replace(spec, metrics=())
    # Who names data wants figures, also of a recipe that has none.
    return replace(spec, data=wanted, metrics=spec.metrics or EvaluationSpec().metrics)


def _from_json(file: Path, point: str) -> Any:
    """The plan in a file, or that of a budget in a sweep's file, or the recipe (else the plan) in a run's record."""
    from hf_shrink.checkpoint.record import RECORD_NAME, read_record
    from hf_shrink.errors import RecipeError
    from hf_shrink.front import Front
    from hf_shrink.pipeline.recipes import load_recipe
    from hf_shrink.plan import Plan

    if not file.is_file():
        raise RecipeError(f"there is no plan file {file}")
    if point:
        return Front.from_json(file).plan(point)
    if file.name == RECORD_NAME:
        record = read_record(file)
        return load_recipe(record.recipe) if record.recipe else record.plan
    return Plan.from_json(file)


def one_line(text: object) -> str:
    """What is printed on one line, whatever it holds."""
    return " ".join(str(text).split())


def check_folder(file: str) -> None:
    """Raises ShrinkError where `file` cannot be written later because its folder is not there."""
    if not Path(file).parent.is_dir():
        raise ShrinkError(f"{file} cannot be written: there is no folder {Path(file).parent}; make it first")
