"""The plays as held-out text and as lines, always the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench_figures import bench

texts = bench("texts")
PLAY = """# Title

### SCENE I. A room.

_Enter TWO_

**FIRST**|
A line that is long enough to be kept,|
short one.

**SECOND**|
And here the _second_ speaks a long line.
*He goes away slowly, to the left.*
A line that is long enough to be kept,
""".replace("|", "  ")


def test_markup_is_taken_off() -> None:
    lines = texts.plain(PLAY).splitlines()
    assert lines[0] == "Title"
    assert {"SCENE I. A room.", "Enter TWO", "FIRST", "And here the second speaks a long line."} <= set(lines)
    assert not any(line.endswith(" ") for line in lines)
    assert texts.plain("snake_case stays") == "snake_case stays\n"


def test_spoken_lines_are_long_and_unique() -> None:
    assert texts.spoken_lines([PLAY, PLAY]) == [
        "A line that is long enough to be kept,",
        "And here the second speaks a long line.",
    ]


def test_the_file_is_written_once_and_restored_when_it_was_changed(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "plays.txt"
    assert texts.write_plays(path) == path
    first, written = path.read_bytes(), path.stat().st_mtime_ns
    assert first.startswith(b"Hamlet\n")
    assert len(first) > 500_000
    assert b"**" not in first
    texts.write_plays(path)
    assert path.stat().st_mtime_ns == written
    path.write_text("changed")
    texts.write_plays(path)
    assert path.read_bytes() == first
    assert [file.name for file in path.parent.iterdir()] == ["plays.txt"]


def test_lines_are_drawn_disjoint_and_by_the_seed() -> None:
    lines = texts.spoken_lines(texts.read_plays(texts.plays_folder()))
    assert len(lines) > 50_000
    held_out, others = texts.split_lines(lines, 500, 1000, seed=3)
    assert (len(set(held_out)), len(set(others))) == (500, 1000)
    assert not set(held_out) & set(others)
    assert texts.split_lines(lines, 500, 1000, seed=3) == (held_out, others)
    assert texts.split_lines(lines, 500, 1000, seed=4)[0] != held_out
    with pytest.raises(ValueError, match="are needed"):
        texts.split_lines(lines[:10], 6, 5, seed=0)


def test_a_folder_without_plays_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no plays"):
        texts.read_plays(tmp_path)
