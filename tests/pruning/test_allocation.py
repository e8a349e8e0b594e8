"""From ratios to counts, on parts made by hand."""

from __future__ import annotations

from collections.abc import Collection

import pytest
import torch

from hf_shrink.errors import RecipeError
from hf_shrink.ops.removal import RemovalCurve
from hf_shrink.pruning.allocate import Allocation, Request, allocate
from hf_shrink.pruning.curves import additive_curve
from hf_shrink.pruning.parts import Part, attention_ways, channel_ways, expert_ways, pools_by

HEAD, GROUP, CHANNEL = 73_728, 294_912, 1_728  # parameters, as in SmolLM2: 3 KV groups of 3 heads, 1536 channels
BLOCK = 3 * GROUP + 1536 * CHANNEL


def shares(count: int, seed: int) -> torch.Tensor:
    values = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values / values.sum()


def attention(
    block: int,
    heads: torch.Tensor | None = None,
    groups: torch.Tensor | None = None,
    allowed: Collection[tuple[int, int]] | None = None,
) -> Part:
    heads = shares(9, block) if heads is None else heads
    groups = heads.view(3, 3).sum(1) if groups is None else groups
    return Part(
        ("decoder", block),
        "attention",
        9,
        attention_ways(additive_curve(heads, 3), additive_curve(groups), HEAD, GROUP, allowed),
        key="heads",
    )


def mlp(block: int, channels: torch.Tensor | None = None, parameters: int = CHANNEL) -> Part:
    channels = shares(1536, 100 + block) if channels is None else channels
    return Part(
        ("decoder", block), "mlp", len(channels), channel_ways(additive_curve(channels), parameters), key="channels"
    )


def blocks(count: int) -> list[Part]:
    return [part for b in range(count) for part in (attention(b), mlp(b))]


def ask(
    parts: list[Part],
    ratio: float,
    units: str = "all",
    portable: bool = True,
    total: int | None = None,
    measured: bool = False,
) -> Allocation:
    total = total or BLOCK * len({part.block for part in parts})
    return allocate(parts, Request(total, ratio, units, portable, measured))  # type: ignore[arg-type]


def counts(allocation: Allocation, kind: str) -> dict[int, int]:
    return {part.block[1]: len(kept) for part, kept in allocation.kept if part.kind == kind}


@pytest.mark.parametrize("measured", [True, False])
@pytest.mark.parametrize("portable", [True, False])
@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.35, 0.6])
def test_the_ratio_is_met_within_one_percent(ratio: float, portable: bool, measured: bool) -> None:
    allocation = ask(blocks(4), ratio, portable=portable, measured=measured)
    assert allocation.removed / (4 * BLOCK) == pytest.approx(ratio, abs=0.01)
    assert not allocation.notes
    kept = counts(allocation, "mlp")
    gone = sum((1536 - n) * CHANNEL for n in kept.values())
    for part, heads in allocation.kept:
        if part.kind == "attention":
            groups = {h // 3 for h in heads}
            gone += (9 - len(heads)) * HEAD + (3 - len(groups)) * (GROUP - 3 * HEAD)
            assert len({sum(h // 3 == g for h in heads) for g in groups}) == 1, "as many heads from every group"
    assert gone == allocation.removed
    assert all(n % 32 == 0 for n in kept.values())


def test_portable_splits_between_attention_and_mlp_in_proportion() -> None:
    """20%: one head of every group is 25% of the attention, one group 33%, nothing 0%; the MLP gives the rest."""
    allocation = ask(blocks(4), 0.2)
    assert set(counts(allocation, "attention").values()) == {6}
    assert len(set(counts(allocation, "mlp").values())) == 1
    small = ask(blocks(4), 0.05)
    assert not counts(small, "attention"), "5% of the attention is less than half a unit"


def test_the_cheaper_of_groups_and_heads_is_taken() -> None:
    idle_group = torch.tensor([1, 1, 1, 0, 0, 0, 1, 1, 1], dtype=torch.float64) / 6
    idle_heads = torch.tensor([0, 1, 1, 1, 0, 1, 1, 1, 0], dtype=torch.float64) / 6
    kept = {}
    for name, scores in (("group", idle_group), ("heads", idle_heads)):
        [(_, kept[name])] = [k for k in ask([attention(0, scores), mlp(0)], 0.3).kept if k[0].kind == "attention"]
    assert kept["group"] == (0, 1, 2, 6, 7, 8)
    assert kept["heads"] == (1, 2, 3, 5, 6, 7)


def test_only_counts_that_stock_accepts_are_used() -> None:
    allowed = [(3, 3), (3, 1), (2, 3)]
    allocation = ask([attention(b, allowed=allowed) for b in range(2)] + [mlp(b) for b in range(2)], 0.25)
    [kept, _] = [k for part, k in allocation.kept if part.kind == "attention"]
    assert len(kept) == 6 and len({h // 3 for h in kept}) == 2, "a whole group: 2 heads of each are not allowed"


@pytest.mark.parametrize("units", ["attention", "mlp"])
@pytest.mark.parametrize("portable", [True, False])
def test_the_other_units_stay(units: str, portable: bool) -> None:
    parts = [part for part in blocks(4) if (part.kind == "mlp") == (units == "mlp")]
    allocation = ask(parts, 0.1, units, portable)
    assert {part.kind for part, _ in allocation.kept} == {units}
    unit = 4 * GROUP if portable and units == "attention" else GROUP if units == "attention" else 0
    assert abs(allocation.removed - 0.4 * BLOCK) <= max(0.04 * BLOCK, unit)


def test_units_too_coarse_for_the_ratio_are_noted() -> None:
    allocation = ask([attention(0)], 0.03, "attention")
    assert not allocation.kept
    assert "removed 0.0%" in allocation.notes[0]


@pytest.mark.parametrize("portable", [True, False])
@pytest.mark.parametrize("units", ["all", "attention", "mlp"])
def test_leaving_nothing_is_an_error(units: str, portable: bool) -> None:
    parts = [part for part in blocks(2) if units == "all" or (part.kind == "mlp") == (units == "mlp")]
    with pytest.raises(RecipeError, match=r"leave nothing .* at most [\d.]+% .* lower ratio"):
        ask(parts, 0.99, units, portable)


def test_at_least_one_unit_is_left_at_the_largest_ratio() -> None:
    most = 2 * GROUP + 1535 * CHANNEL
    for portable in (True, False):
        allocation = ask([attention(0), mlp(0)], most / BLOCK, portable=portable)
        assert all(kept for _, kept in allocation.kept)
        assert allocation.removed / BLOCK == pytest.approx(most / BLOCK, abs=0.01)


def test_uneven_takes_from_where_scores_are_concentrated() -> None:
    """A block in which few channels carry everything can lose the rest; one in which all matter alike cannot."""
    concentrated = torch.cat([torch.ones(200), torch.full((1336,), 1e-4)]).double()
    alike = torch.ones(1536, dtype=torch.float64)
    parts = [mlp(0, concentrated / concentrated.sum()), mlp(1, alike / alike.sum())]
    kept = counts(ask(parts, 0.2, "mlp", portable=False, total=2 * 1536 * CHANNEL), "mlp")
    assert kept[0] == 1536 - round(0.4 * 1536 / 32) * 32
    assert 1 not in kept


def test_no_block_loses_more_than_four_fifths_unless_it_must() -> None:
    idle = torch.zeros(100, dtype=torch.float64)
    parts = [mlp(0, idle), *(mlp(b, shares(100, b)) for b in range(1, 4))]
    total = 400 * CHANNEL
    kept = counts(ask(parts, 0.4, "mlp", portable=False, total=total), "mlp")
    assert kept[0] == 20
    assert sum(kept.values()) == 240
    kept = counts(ask(parts, 0.9, "mlp", portable=False, total=total), "mlp")
    assert sum(kept.values()) == 40 and min(kept.values()) >= 1


def test_channel_counts_are_round_where_that_keeps_the_ratio() -> None:
    wide = [mlp(0, shares(4096, 0))]
    assert counts(ask(wide, 0.21, "mlp", total=4096 * CHANNEL), "mlp")[0] % 64 == 0
    narrow = [mlp(0, shares(500, 0))]
    assert counts(ask(narrow, 0.21, "mlp", total=500 * CHANNEL), "mlp")[0] == 395
    coarse = [mlp(0, shares(512, 0))]  # 32 of 512 are 6%: 21.4% needs the exact count
    assert counts(ask(coarse, 0.214, "mlp", total=512 * CHANNEL), "mlp")[0] == round(512 * (1 - 0.214))


def test_stacks_that_share_a_key_get_one_count_and_others_their_own() -> None:
    other = Part(("vision", 0), "mlp", 800, channel_ways(additive_curve(shares(800, 5)), 500), key="vision channels")
    parts = [mlp(0), mlp(1), other]
    total = 2 * 1536 * CHANNEL + 800 * 500
    allocation = ask(parts, 0.25, "mlp", total=total)
    kept = {part.block: len(k) for part, k in allocation.kept}
    assert kept["decoder", 0] == kept["decoder", 1]
    assert kept["vision", 0] == pytest.approx(600, abs=32)
    assert allocation.removed / total == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("ratio", [0.12, 0.2, 0.29, 0.37])
def test_narrow_experts_beside_a_wide_mlp_keep_multiples_of_8(ratio: float) -> None:
    channels = additive_curve(shares(4 * 128, 7), 4)
    experts = Part(("decoder", 1), "experts", 4 * 128, expert_ways(channels, 4, 4 * CHANNEL), key="expert channels")
    total = (1536 + 4 * 128) * CHANNEL
    allocation = ask([mlp(0), experts], ratio, "mlp", total=total)
    assert counts(allocation, "mlp")[0] % 32 == 0
    assert counts(allocation, "experts")[1] % (4 * 8) == 0
    assert allocation.removed / total == pytest.approx(ratio, abs=0.01)


def test_tied_parts_lose_the_same_heads_even_when_blocks_may_differ() -> None:
    heads = shares(9, 1)
    ways = attention_ways(additive_curve(heads, 3), additive_curve(heads.view(3, 3).sum(1)), HEAD, GROUP)
    parts = [Part(("encoder", b), "attention", 9, ways, key="heads", tied="encoder") for b in range(3)]
    assert len(pools_by(parts, portable=False)) == 1
    allocation = ask(parts, 0.1, "attention", portable=False)
    assert len(allocation.kept) == 3
    assert len({kept for _, kept in allocation.kept}) == 1


def curve(losses: list[float]) -> RemovalCurve:
    count = len(losses)
    return RemovalCurve(torch.arange(count), torch.tensor(losses).double(), torch.ones(count).double())


def part(block: int, losses: list[float], parameters: int = 100) -> Part:
    return Part(("decoder", block), "mlp", len(losses), channel_ways(curve(losses), parameters), key="channels")


def test_measured_costs_decide_where_units_go() -> None:
    """Quadratic costs, four times as dear in the first block: it loses a quarter of what the second does."""
    parts = [part(block, [factor * n**2 for n in range(1, 101)]) for block, factor in enumerate([4.0, 1.0])]
    kept = counts(ask(parts, 0.25, "mlp", portable=False, total=20_000, measured=True), "mlp")
    assert kept == {0: 90, 1: 60}


def test_a_step_that_is_only_worth_it_as_a_whole_is_taken_as_a_whole() -> None:
    """The first half of the second block costs as much as all of its 80%: a hull of its curve, not its first step."""
    parts = [part(0, [float(n) for n in range(1, 101)]), part(1, [30.0] * 80 + [1e3] * 20)]
    kept = counts(ask(parts, 0.4, "mlp", portable=False, total=20_000, measured=True), "mlp")
    assert kept == {1: 20}


def test_measured_and_portable_the_cheaper_kind_gives_more() -> None:
    cheap, dear = ([factor * n for n in range(1, 1537)] for factor in (1e-9, 1.0))
    for channels, heads in ((cheap, 9), (dear, 3)):
        parts = [p for b in range(3) for p in (attention(b), part(b, channels, CHANNEL))]
        allocation = ask(parts, 0.2, total=3 * BLOCK, measured=True)
        assert set(counts(allocation, "attention").values()) == ({heads} if heads < 9 else set())
        assert len(set(counts(allocation, "mlp").values())) <= 1
        assert allocation.removed / (3 * BLOCK) == pytest.approx(0.2, abs=0.01)
