"""`hf-shrink plan`: say what run would do, block by block; or what each of several budgets would buy."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import Any

from hf_shrink.cli.options import Commands, add_device, add_memory, add_recipe, add_source, check_folder, recipe_of


def add(commands: Commands) -> None:
    parser = commands.add_parser("plan", help="say what run would do, without doing it")
    add_source(parser)
    add_recipe(parser)
    parser.add_argument(
        "--sweep",
        type=_budgets,
        default=[],
        metavar="SIZES",
        help="several budgets, such as 20%%,30%%,45%%: a plan and its quality for each, from one measurement",
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write the plan, which run takes as --recipe; of a sweep all points"
    )
    parser.add_argument("--figure", metavar="FILE", help="draw the plan, or the points of a sweep, as .html or .png")
    add_memory(parser)
    add_device(parser)
    parser.set_defaults(command=command, shared=True)


def _budgets(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def command(options: argparse.Namespace) -> None:
    from hf_shrink.pipeline import open_checkpoint
    from hf_shrink.reporting.plots import check_figure

    recipe = recipe_of(options)
    for file in filter(None, (options.json, options.figure)):
        check_folder(file)
    if options.figure:
        check_figure(options.figure)
    say = partial(print, file=sys.stderr)
    with open_checkpoint(options.source, options.max_memory, options.device, say) as (model, processing):
        settings = {
            "tokenizer": processing,
            "calibration": options.calibration,
            "seed": options.seed,
            "progress": not options.quiet,
        }
        (_sweep if options.sweep else _one)(options, model, recipe, settings)


def _one(options: argparse.Namespace, model: Any, recipe: Any, settings: dict[str, Any]) -> None:
    from hf_shrink.pipeline.estimating import estimate
    from hf_shrink.pipeline.made_for import as_carried_out, check_made_for
    from hf_shrink.pipeline.planning import find_binding
    from hf_shrink.pipeline.recipes import calibration_of
    from hf_shrink.pipeline.shrinking import planned
    from hf_shrink.plan import Plan
    from hf_shrink.reporting.plan_chart import write_plan_map
    from hf_shrink.reporting.plan_table import print_plan
    from hf_shrink.residence import bytes_of
    from hf_shrink.sharding import ranks

    if isinstance(recipe, Plan):
        check_made_for(model, recipe)
    found = as_carried_out(model, recipe) if isinstance(recipe, Plan) else planned(model, recipe, **settings)
    plan = found.plan
    if not ranks().first:
        return
    binding = find_binding(model)
    if binding is not None:
        print_plan(plan, binding)
    # The table has what is kept of each block, which the summary says in its indented lines.
    print("\n".join(line for line in plan.summary().splitlines() if binding is None or not line.startswith("  ")))
    for note in found.notes:
        print(f"note: {note}")
    spec = calibration_of(plan)
    print(estimate(model, plan, spec.samples * spec.length, bytes_of(options.max_memory)).summary())
    if options.json:
        plan.to_json(options.json)
    if options.figure and binding is not None:
        print(write_plan_map(plan, binding, options.figure))


def _sweep(options: argparse.Namespace, model: Any, recipe: Any, settings: dict[str, Any]) -> None:
    from hf_shrink.pipeline.sweep import make_front
    from hf_shrink.reporting.front_chart import front_lines, write_front
    from hf_shrink.sharding import ranks

    front = make_front(model, recipe, options.sweep, **settings)
    if not ranks().first:
        return
    print("\n".join(front_lines(front)))
    print(f"measured on {front.data}")
    if options.json:
        front.to_json(options.json)
    if options.figure:
        print(write_front(front, options.figure))
