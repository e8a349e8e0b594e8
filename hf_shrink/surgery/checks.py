"""Check the numbers by which a plan names units, blocks and experts."""

from __future__ import annotations

from collections.abc import Sequence

from hf_shrink.errors import ArchitectureError
from hf_shrink.ranges import are_numbers


def check_units(kept: Sequence[int], count: int, path: str, what: str) -> None:
    """Raises ArchitectureError unless these are ascending numbers below `count`, and some of them."""
    if not kept:
        raise ArchitectureError(f"{path}: nothing would be left of its {what}; keep at least one")
    if not are_numbers(kept) or list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= count:
        raise ArchitectureError(f"{path}: kept {what} must be ascending whole numbers below {count}, each once")
