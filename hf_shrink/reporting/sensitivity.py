"""What each block is worth to the predictions, as it was measured or predicted while planning."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from hf_shrink.plan import Plan
from hf_shrink.reporting.palette import level_of_bits

_BLOCK = re.compile(r"([^ :]+\.\d+)(?:[ :].*)?")


@dataclass(frozen=True)
class Sensitivity:
    """Nats of KL divergence to the dense model.

    Attributes:
        blocks: paths of the blocks, in order.
        options: by what is done to all of a block ("W4 g64", "dropped"), what that costs, a value a block; NaN where it
            was not measured.
    """

    blocks: tuple[str, ...]
    options: Mapping[str, tuple[float, ...]]

    @property
    def numbers(self) -> list[str]:
        """Of the blocks, for the axis of a chart."""
        return [path.rsplit(".", 1)[-1] for path in self.blocks]


def sensitivity_of(plan: Plan) -> Sensitivity | None:
    """What a search found of every block under every option; None where there was none, or nothing costs a thing."""
    blocks: dict[str, dict[str, float]] = {}
    for name, options in plan.search.get("sensitivity", {}).items():
        match = _BLOCK.fullmatch(name)
        for option, nats in options.items() if match else ():
            own = blocks.setdefault(match[1], {}) if match else {}
            own[option] = own.get(option, 0.0) + nats
    names = dict.fromkeys(option for own in blocks.values() for option in own)
    found = {name: tuple(own.get(name, float("nan")) for own in blocks.values()) for name in names}
    measured = any(value > 0 for values in found.values() for value in values)
    return Sensitivity(tuple(blocks), found) if measured else None


def predicted_by_block(plan: Plan) -> dict[str, float]:
    """What the plan itself was predicted to cost, by path of the block; empty where nothing was predicted."""
    found: dict[str, float] = {}
    for name, nats in plan.damage.items():
        match = _BLOCK.fullmatch(name)
        if match:
            found[match[1]] = found.get(match[1], 0.0) + nats
    return found


def kind_of_option(option: str) -> str:
    """The class of an option's colour: its bits' step, or the other colour."""
    bits = re.match(r"W(\d+)", option)
    return f"k{level_of_bits(int(bits[1]))}" if bits else "other"
