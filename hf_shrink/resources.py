"""What ships with the package: where the YAML recipes are, and which metrics there are."""

from __future__ import annotations

from pathlib import Path

from hf_shrink.errors import RecipeError

_PACKAGE = Path(__file__).resolve().parent


def recipes_folder(kind: str) -> Path:
    """The folder of the built-in recipes of one kind: "compression", "calibration" or "evaluation".

    An installed wheel has them inside the package, a source checkout next to it. Raises RecipeError when neither is
    there.
    """
    candidates = (_PACKAGE / "recipes" / kind, _PACKAGE.parent / "recipes" / kind)
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise RecipeError(
        f"the built-in {kind} recipes are missing (looked in {', '.join(map(str, candidates))}); "
        "install hf_shrink again, or give the path of a recipe file"
    )


def metric_names() -> tuple[str, ...]:
    """The metrics, sorted: one a file."""
    return tuple(sorted(path.stem for path in (_PACKAGE / "evaluation" / "metrics").glob("[!_]*.py")))
