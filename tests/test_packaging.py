"""The wheel: what is in it, and that it works away from this folder."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Import name -> distribution, where they differ.
DISTRIBUTIONS = {"yaml": "pyyaml", "sklearn": "scikit-learn", "PIL": "pillow"}
# Come with transformers and torch, which pin the versions that fit them.
TRANSITIVE = {"tokenizers", "packaging", "jinja2"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    (built,) = WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    return Path(built)


def test_wheel_carries_recipes_license_and_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        for recipe in (ROOT / "recipes").rglob("*.yaml"):
            assert f"hf_shrink/recipes/{recipe.relative_to(ROOT / 'recipes').as_posix()}" in names
        for module in (ROOT / "hf_shrink").rglob("*.py"):
            assert module.relative_to(ROOT).as_posix() in names
        assert "hf_shrink/py.typed" in names
        assert not [n for n in names if not n.startswith(("hf_shrink/", "hf_shrink-"))]
        (entry_points,) = (n for n in names if n.endswith("entry_points.txt"))
        assert "hf-shrink = hf_shrink.cli:main" in archive.read(entry_points).decode()
        (license_file,) = (n for n in names if n.endswith("LICENSE"))
        assert "Apache License" in archive.read(license_file).decode()


def test_the_unpacked_wheel_runs_knows_its_recipes_and_fails_with_two_and_no_traceback(
    wheel: Path, tmp_path: Path
) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    before = sorted(tmp_path.iterdir())
    # An interpreter whose only hf_shrink is the wheel's, started away from the source tree.
    done = subprocess.run(
        [sys.executable, "-m", "hf_shrink", "run", "absent", "--output", "out", "--recipe", "qqqq"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and not done.stdout
    for recipe in (ROOT / "recipes" / "compression").glob("*.yaml"):
        assert recipe.stem in done.stderr
    assert sorted(tmp_path.iterdir()) == before


def third_party_imports() -> set[str]:
    """Top-level packages that hf_shrink imports, inside functions too."""
    found: set[str] = set()
    for path in (ROOT / "hf_shrink").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found.update(alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"hf_shrink"}


def test_every_import_is_declared() -> None:
    extras = PROJECT["optional-dependencies"]
    declared = {
        re.split(r"[<>=!~\[; ]", requirement)[0].lower().replace("_", "-")
        for requirement in [*PROJECT["dependencies"], *(r for name in extras if name != "dev" for r in extras[name])]
    }
    imported = {DISTRIBUTIONS.get(name, name).lower().replace("_", "-") for name in third_party_imports()}
    assert imported - declared - TRANSITIVE == set()
