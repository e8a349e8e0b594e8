"""Text that is passed where a name or a path belongs is told to be text, wherever names are taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_llama, tiny_tokenizer

from hf_shrink import Front, Plan, evaluate_model, make_plan, shrink, shrink_checkpoint
from hf_shrink.errors import CalibrationError, RecipeError, ShrinkError
from hf_shrink.paths import is_name

LONG = "It was a dark and stormy night; " * 20
LINES = "steps:\n  - quantize: {method: rtn}\n"
GPTQ: dict[str, Any] = {"steps": [{"quantize": {"group_size": 8}}]}


def test_what_can_be_a_name(tmp_path: Path) -> None:
    assert is_name("wikitext") and is_name(tmp_path / "not there" / "a.yaml") and is_name("a dark night.txt")
    assert not is_name(LONG) and not is_name(LINES) and not is_name("a\0b")


def calibrated(text: str) -> None:
    shrink(tiny_llama(), GPTQ, tokenizer=tiny_tokenizer(), calibration=text, progress=False)


def evaluated(text: str) -> None:
    evaluate_model(tiny_llama(), text, tokenizer=tiny_tokenizer())


@pytest.mark.parametrize("text", [LONG, LONG + "\n" + LONG, "one\0two"])
@pytest.mark.parametrize(
    ("act", "kind", "instead"),
    [
        (calibrated, CalibrationError, "pass a list of texts, or write it into a .txt file"),
        (evaluated, CalibrationError, "pass a list of texts"),
        (lambda text: make_plan(tiny_llama(), text, progress=False), RecipeError, "or pass the mapping that it spells"),
        (Plan.from_json, RecipeError, "pass the path of a plan, or the JSON text of one"),
        (Front.from_json, RecipeError, "pass the path of a front, or the JSON text of one"),
    ],
)
def test_text_in_the_place_of_a_name(
    act: Callable[[str], object], kind: type[ShrinkError], instead: str, text: str
) -> None:
    with pytest.raises(kind, match=rf"\.\.\. looks like text, not like a name or a path; .*{instead}") as raised:
        act(text)
    assert len(str(raised.value)) < 250


def test_text_in_the_place_of_a_name_leaves_no_folder(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    with pytest.raises(CalibrationError, match="looks like text"):
        shrink_checkpoint(
            tmp_path / "model", tmp_path / "out", GPTQ, tokenizer=tiny_tokenizer(), calibration=LONG, progress=False
        )
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_plan_that_is_not_there(tmp_path: Path) -> None:
    for kind, name in ((Plan, "plan"), (Front, "front")):
        with pytest.raises(RecipeError, match=rf"cannot read {name} .*nope\.json: .*No such file"):
            kind.from_json(tmp_path / "nope.json")
