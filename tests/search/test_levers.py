"""What options are made of, what they are compared with, and what each lever paid."""

from __future__ import annotations

import pytest

from hf_shrink.plan import BlockPlan, Plan, Scheme
from hf_shrink.search.levers import levers_of, paid, paid_in_all, uniform
from hf_shrink.search.options import Change, Cost, Group, Option, Problem

W4, W3 = Scheme(4), Scheme(3)
NARROW = BlockPlan(channels=(0, 1))


def option(name: str, size: int, schemes: dict[str, Scheme], block: BlockPlan | None = None, **more: bool) -> Option:
    return Option(name, Cost(size), 0.1, Change(schemes, block or BlockPlan(), **more))


def problem() -> Problem:
    options = (
        option("dense", 1000, {}),
        option("W4 in", 700, {"up": W4}),
        option("W4", 300, {"up": W4, "down": W4}),
        option("W4 in, W3 out", 280, {"up": W4, "down": W3}),
        option("narrow", 600, {}, NARROW),
        option("W4 narrow", 180, {"up": W4, "down": W4}, NARROW),
        option("W3 narrow", 160, {"up": W3, "down": W3}, NARROW),
        option("dropped", 0, {}, dropped=True),
    )
    outer = (option("dense", 500, {}), option("W8", 250, {"embed": Scheme(8)}))
    block, embedding = Group("blocks.0 mlp", options, "decoder", 0), Group("embed", outer)
    return Problem((block, embedding), Cost(10), (), (), Plan("made-up"), {"decoder": 1})


def test_levers() -> None:
    found = [levers_of(option) for option in problem().groups[0].options]
    assert found == [set(), {"bits"}, {"bits"}, {"bits"}, {"width"}, {"bits", "width"}, {"bits", "width"}, {"depth"}]


def test_the_same_bits_everywhere_means_all_matrices_of_the_blocks() -> None:
    assert uniform(problem(), 4) == (2, 0)
    assert uniform(problem(), 3) is None


@pytest.mark.parametrize(
    ("taken", "expected"),
    [
        ((0, 0), (0, 0, 0)),
        ((2, 1), (700 + 250, 0, 0)),
        ((4, 0), (0, 400, 0)),
        ((5, 0), (420, 400, 0)),  # the same cut without bits saves 400
        ((7, 0), (0, 0, 1000)),
    ],
)
def test_who_paid(taken: tuple[int, int], expected: tuple[float, float, float]) -> None:
    found = paid_in_all(paid(problem(), taken))
    assert tuple(found.values()) == pytest.approx(expected)


def test_who_paid_where_the_same_cut_is_not_there_without_bits() -> None:
    whole = problem()
    options = tuple(o for o in whole.groups[0].options if o.name != "narrow")
    group = Group("blocks.0 mlp", options, "decoder", 0)
    rest = Problem((group,), whole.fixed, (), (), whole.base, whole.depths)
    found = paid(rest, (4,))["blocks.0 mlp"]  # W4 narrow takes 180 of W4's 300: 40% were cut away
    assert found == pytest.approx({"width": 400, "bits": 420})
