"""`hf-shrink plan`: say what run would do."""

from __future__ import annotations

import argparse

from hf_shrink.cli.options import Commands, add_recipe, add_source, recipe_of


def add(commands: Commands) -> None:
    parser = commands.add_parser("plan", help="say what run would do, without doing it")
    add_source(parser)
    add_recipe(parser)
    parser.add_argument("--json", metavar="FILE", help="write the plan; run takes it as --recipe")
    parser.set_defaults(command=command)


def command(options: argparse.Namespace) -> None:
    from hf_shrink.checkpoint.source import load_processing, load_source_model, open_source
    from hf_shrink.errors import RecipeError
    from hf_shrink.pipeline import make_plan
    from hf_shrink.plan import Plan
    from hf_shrink.reporting import silence

    recipe = recipe_of(options)
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
