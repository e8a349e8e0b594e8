"""`hf-shrink recipes`: list the built-in recipes."""

from __future__ import annotations

import argparse

from hf_shrink.cli.options import Commands

KINDS = {
    "compression": "compression (--recipe of run and plan)",
    "calibration": "data (--calibration, --evaluation, --data)",
    "evaluation": "evaluation (--recipe or --data of evaluate)",
}


def add(commands: Commands) -> None:
    parser = commands.add_parser("recipes", help="list the built-in recipes")
    parser.add_argument("kind", nargs="?", choices=list(KINDS), help="only those (default: all)")
    parser.set_defaults(command=command)


def command(options: argparse.Namespace) -> None:
    from hf_shrink.resources import recipes_folder

    for kind, title in KINDS.items():
        if options.kind not in (None, kind):
            continue
        print(f"{title}:")
        for path in sorted(recipes_folder(kind).glob("*.yaml")):
            print(f"  {path.stem:<22} {_said(path.read_text(encoding='utf-8'))}")


def _said(text: str) -> str:
    """A recipe in a line: its description, else its first comment."""
    import yaml

    return str(yaml.safe_load(text).get("description") or text.splitlines()[0].lstrip("# "))
