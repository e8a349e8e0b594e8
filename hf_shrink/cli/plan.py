"""`hf-shrink plan`: say what run would do."""

from __future__ import annotations

import argparse

from hf_shrink.cli.options import Commands, add_memory, add_recipe, add_source, recipe_of


def add(commands: Commands) -> None:
    parser = commands.add_parser("plan", help="say what run would do, without doing it")
    add_source(parser)
    add_recipe(parser)
    parser.add_argument("--json", metavar="FILE", help="write the plan; run takes it as --recipe")
    add_memory(parser)
    parser.set_defaults(command=command)


def command(options: argparse.Namespace) -> None:
    from hf_shrink.errors import RecipeError
    from hf_shrink.pipeline import plan_checkpoint
    from hf_shrink.plan import Plan

    recipe = recipe_of(options)
    if isinstance(recipe, Plan):
        raise RecipeError(f"{options.recipe} is a plan already")
    plan, needs = plan_checkpoint(
        options.source,
        recipe,
        calibration=options.calibration,
        seed=options.seed,
        max_memory=options.max_memory,
        progress=not options.quiet,
    )
    if options.json:
        plan.to_json(options.json)
    print(plan.summary())
    print(needs.summary())
