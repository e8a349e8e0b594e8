"""The README: its tables and picture are those of the results, and its commands exist."""

from __future__ import annotations

import argparse
import copy
import shlex
import xml.etree.ElementTree as ET
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from bench_figures import bench

from hf_shrink import cli

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def readme() -> ModuleType:
    return bench("readme")


def test_nothing_is_stale(readme: ModuleType) -> None:
    stale = [path.name for path, text in readme.made().items() if path.read_text(encoding="utf-8") != text]
    assert not stale, "run python scripts/bench/readme.py"


def test_another_figure_makes_both_stale(readme: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    read = readme.read

    def better(name: str) -> dict[str, Any]:
        content = copy.deepcopy(read(name))
        if name == "quality":
            (ours,) = (variant for variant in content["summary"] if variant.startswith("balanced:W4"))
            content["summary"][ours]["excess_loss"]["mansfieldpark"] = 0.001
        return content

    monkeypatch.setattr(readme, "read", better)
    assert all(path.read_text(encoding="utf-8") != text for path, text in readme.made().items())


def test_a_table_that_has_no_place_is_an_error(readme: ModuleType) -> None:
    with pytest.raises(ValueError, match="end of quality"):
        readme.filled("# A title\n", {"quality": "|x|"})


def test_a_row_for_every_result(readme: ModuleType) -> None:
    tables = bench("readme_tables")
    quality, speed = readme.read("quality"), readme.read("speed")
    table = tables.quality_table(quality, {"results": [], "commit": "abc"})
    assert len(table.splitlines()) == 2 + len(quality["results"])
    rates = [
        float(line.split("|")[2].split()[0]) for line in tables.speed_table(speed, "smollm2-135m").splitlines()[2:]
    ]
    assert len(rates) == sum(result["subject"] == "smollm2-135m" for result in speed["results"])
    assert rates == sorted(rates, reverse=True)
    assert tables.speed_table(speed, "absent").count("\n") == 1


def test_an_older_figure_gives_way_to_a_newer_one(readme: ModuleType) -> None:
    tables = bench("readme_tables")
    names = [(row.name, row.bits) for row in tables.rated(readme.read("quality"), readme.read("quality-part1"))]
    assert len(names) == len(set(names))
    assert ("**hf_shrink**, `method: gptq`", 4) not in names  # measured again as `effort: balanced`


def test_the_picture_says_in_words_what_it_shows(readme: ModuleType) -> None:
    root = ET.fromstring((ROOT / ".github" / "result.svg").read_text(encoding="utf-8"))
    space = "{http://www.w3.org/2000/svg}"
    said = root.findtext(f"{space}desc") or ""
    shown = [element.text or "" for element in root.iter(f"{space}text")]
    assert len(shown) > 20
    assert not [text for text in shown if text not in said]


def commands(text: str) -> list[list[str]]:
    """The command lines in a text, without what is said about them."""
    lines = [line.strip() for line in text.splitlines() if line.startswith(("    hf-shrink ", "  hf-shrink "))]
    return [shlex.split(line.split("  ")[0], comments=True)[1:] for line in lines]


@pytest.mark.parametrize("where", ["README.md", "help"])
def test_the_commands_that_are_shown_exist(where: str) -> None:
    text = (ROOT / where).read_text(encoding="utf-8") if where != "help" else cli.NEXT_STEPS
    found = commands(text)
    assert len(found) > 5
    for arguments in found:
        options = cli._parser().parse_args(arguments)
        assert isinstance(options, argparse.Namespace) and callable(options.command)


def test_the_choices_in_the_help_can_be_made() -> None:
    lines = [line.strip() for line in cli.NEXT_STEPS.splitlines() if line.startswith("  --")]
    assert len(lines) > 3
    for line in lines:
        cli._parser().parse_args(["run", "model", "--output", "out", *shlex.split(line.split("   ")[0])])


def test_every_command_says_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    said = capsys.readouterr().out
    assert "from a model to a smaller one" in said
    assert max(map(len, said.splitlines())) <= 120
