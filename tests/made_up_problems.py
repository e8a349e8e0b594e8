"""Made-up problems of the kinds that a search meets: small enough to try every assignment."""

from __future__ import annotations

import itertools
import random

from hf_shrink.plan import BlockPlan, Plan, Scheme
from hf_shrink.search.options import Assignment, Change, Cost, Group, Option, Problem

DENSE = 1000


def made_up(seed: int, blocks: int = 3, portable: bool = True) -> Problem:
    """Two groups a block and an embedding: bits, three channel counts that all blocks share if portable, dropping."""
    chance = random.Random(seed)
    groups: list[Group] = []
    links: list[tuple[tuple[int, int], ...]] = []
    for block in range(blocks):
        attention = [_option("dense", DENSE, 0.0)]
        attention += [_option(f"W{bits}", DENSE * bits // 16, _damage(chance, bits), bits) for bits in (4, 8)]
        attention.append(Option("dropped", Cost(), chance.uniform(0.1, 1.0), Change(dropped=True)))
        mlp = []
        for channels in (16, 12, 8):
            needs = (f"channels {channels}",) if portable else ()
            share, loss = channels / 16, (16 - channels) * chance.uniform(0.01, 0.1)
            kept = Change(block=BlockPlan(channels=tuple(range(channels)))) if channels < 16 else Change()
            for bits in (16, 4, 3):
                cost = Cost(int(2 * DENSE * share * bits / 16), seconds={"decode": share * (0.5 + bits / 32)})
                damage = loss + (0 if bits == 16 else _damage(chance, bits))
                mlp.append(Option(f"{channels} at {bits}", cost, damage, kept, needs))
        mlp.append(Option("dropped", Cost(), chance.uniform(0.1, 1.0), Change(dropped=True)))
        links.append(((len(groups), 3), (len(groups) + 1, 9)))
        groups.append(Group(f"blocks.{block} attention", tuple(attention), "decoder", block))
        groups.append(Group(f"blocks.{block} mlp", tuple(mlp), "decoder", block))
    groups.append(Group("embed", (_option("dense", DENSE, 0.0), _option("W8", DENSE // 2, 0.01, 8))))
    switches = (("channels 16", "channels 12", "channels 8"),) if portable else ()
    fixed = Cost(bytes=77, cache=3, seconds={"decode": 0.25})
    return Problem(tuple(groups), fixed, tuple(links), switches, Plan("made-up", method="rtn"), {"decoder": blocks})


def _option(name: str, size: int, damage: float, bits: int | None = None) -> Option:
    schemes = {} if bits is None else {name: Scheme(bits)}
    return Option(name, Cost(size, cache=size // 100, seconds={"decode": size / DENSE}), damage, Change(schemes))


def _damage(chance: random.Random, bits: int) -> float:
    return chance.uniform(0.5, 2.0) * 4.0**-bits


def everything(problem: Problem) -> list[Assignment]:
    """Every assignment that links and switches allow."""
    return [a for a in itertools.product(*(range(len(g.options)) for g in problem.groups)) if problem.allowed(a)]
