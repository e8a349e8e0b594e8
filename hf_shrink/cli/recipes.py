"""`hf-shrink recipes`: list the built-in recipes."""

from __future__ import annotations

import argparse

from hf_shrink.cli.options import Commands


def add(commands: Commands) -> None:
    parser = commands.add_parser("recipes", help="list the built-in recipes")
    parser.set_defaults(command=command)


def command(options: argparse.Namespace) -> None:
    from hf_shrink.pipeline.recipes import built_in_recipes

    for name, path in built_in_recipes().items():
        first = path.read_text().splitlines()[0].lstrip("# ")
        print(f"{name:<16} {first}")
