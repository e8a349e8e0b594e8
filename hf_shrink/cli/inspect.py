"""`hf-shrink inspect`: what a model is made of."""

from __future__ import annotations

import argparse

from hf_shrink.cli.options import Commands, add_source


def add(commands: Commands) -> None:
    parser = commands.add_parser("inspect", help="what a model is made of, its bytes, and what can be pruned")
    add_source(parser)
    parser.set_defaults(command=command)


def command(options: argparse.Namespace) -> None:
    from hf_shrink.architectures.inspect import describe
    from hf_shrink.checkpoint.measured import source_skeleton
    from hf_shrink.checkpoint.source import open_source
    from hf_shrink.reporting import silence

    with silence():
        description = describe(source_skeleton(open_source(options.source)))
    print(description.to_text())
