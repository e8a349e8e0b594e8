"""A Scheme says how a weight is stored, and how the input that it is multiplied with is rounded. Data only."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from hf_shrink.errors import RecipeError
from hf_shrink.registry import did_you_mean
from hf_shrink.values import check_one_of, check_switch, is_whole

Strategy = Literal["tensor", "channel", "group"]
STRATEGIES = ("tensor", "channel", "group")
BITS = tuple(range(2, 9))
ValueType = Literal["int", "float"]


class Kind(NamedTuple):
    """What a scheme's name says: weight bits, the type of the values, and to how many bits activations are rounded."""

    bits: int
    type: ValueType = "int"
    activation_bits: int = 16

    @property
    def by_channel(self) -> bool:
        """Whether it comes in one form only: symmetric, one scale per output channel."""
        return self.type == "float" or self.activation_bits < 16


KINDS = {f"W{bits}A16": Kind(bits) for bits in BITS} | {"W8A8": Kind(8, "int", 8), "FP8A16": Kind(8, "float")}


@dataclass(frozen=True)
class Scheme:
    """How a weight is stored: values of `bits`, with a scale for the tensor, each row, or each group of columns.

    Attributes:
        bits: of a value.
        symmetric: zero is in the middle; asymmetric schemes have zero points. Integers only.
        strategy: what shares a scale.
        group_size: columns that share one; set exactly when `strategy` is "group".
        type: "int", or "float" for float8_e4m3fn.
        activation_bits: 16 leaves the Linear's input as it is; 8 rounds it to int8, with a scale for each token that is
            chosen while the model runs. Only with int8 weights.
        activation_symmetric: whether the rounded input goes without a zero point, which wastes half of the values on
            inputs that lie on one side, as behind GELU. Only with 8-bit activations.
    """

    bits: int
    symmetric: bool = True
    strategy: Strategy = "group"
    group_size: int | None = 128
    type: ValueType = "int"
    activation_bits: int = 16
    activation_symmetric: bool = False

    def __post_init__(self) -> None:
        if not is_whole(self.bits) or self.bits not in BITS:
            near = f"; did you mean {min(max(self.bits, 2), 8)}?" if is_whole(self.bits) else ", a whole number"
            raise RecipeError(f"weights can have 2 to 8 bits, not {self.bits!r}{near}")
        for name in ("symmetric", "activation_symmetric"):
            check_switch(getattr(self, name), name)
        check_one_of(self.strategy, STRATEGIES, "strategy")
        size = self.group_size
        if self.strategy == "group" and size is None:
            raise RecipeError(
                "strategy: group needs a group_size, such as 128; for one scale a row write strategy: channel"
            )
        if self.strategy != "group" and size is not None:
            raise RecipeError(
                f"group_size: {size} goes with strategy: group, not with strategy: {self.strategy}; take it out "
                "(or set it to null), or write strategy: group"
            )
        if size is not None and (not is_whole(size) or size < 1):
            raise RecipeError(f"group_size must be a whole number of at least 1, not {size!r}")
        kind = Kind(self.bits, self.type, self.activation_bits)
        if kind not in KINDS.values() or not is_whole(self.activation_bits):
            raise RecipeError(
                f"no scheme has {self.bits}-bit {self.type} weights with {self.activation_bits}-bit activations; "
                f"there are {', '.join(KINDS)}"
            )
        if kind.by_channel and not (self.strategy == "channel" and self.symmetric):
            raise RecipeError(f"{self.name} is symmetric with one scale per channel (strategy: channel), nothing else")
        if self.activation_symmetric and self.activation_bits == 16:
            raise RecipeError(f"{self.name} does not round its inputs; activation_symmetric goes with W8A8")

    @property
    def name(self) -> str:
        """For example W4A16."""
        kind = Kind(self.bits, self.type, self.activation_bits)
        return next(name for name, known in KINDS.items() if known == kind)

    @property
    def packed(self) -> bool:
        """Whether a checkpoint holds the values packed into int32 words; else as they are, in int8 or float8."""
        return self.type == "int" and self.activation_bits == 16

    @staticmethod
    def kind_of(name: str) -> Kind:
        """What a scheme's name says. Raises RecipeError naming the nearest valid one."""
        kind = KINDS.get(name.upper())
        if kind is None:
            bits = re.fullmatch(r"W(\d+)A16", name.upper())
            nearest = f"W{min(max(int(bits[1]), 2), 8)}A16" if bits else None
            hint = f"did you mean {nearest!r}?" if nearest else did_you_mean(name.upper(), KINDS)
            raise RecipeError(f"unknown scheme {name!r}; {hint}")
        return kind

    @staticmethod
    def bits_of(name: str) -> int:
        """The weight bits of a scheme's name, such as 4 of "W4A16". Raises RecipeError naming the nearest valid one."""
        return Scheme.kind_of(name).bits

    def for_width(self, in_features: int) -> Scheme:
        """This scheme with a group size that divides `in_features`.

        A group size that does not becomes the largest of 128, 64, 32 not above it that does, else the largest divisor.
        """
        if self.group_size is None or in_features % self.group_size == 0:
            return self
        for size in (128, 64, 32):
            if size <= self.group_size and in_features % size == 0:
                return replace(self, group_size=size)
        size = max(d for d in range(1, min(self.group_size, in_features) + 1) if in_features % d == 0)
        return replace(self, group_size=size)

    def scale_columns(self, in_features: int) -> int:
        """How many scales a row has (1 unless grouped)."""
        return in_features // self.group_size if self.group_size else 1

    def stored_bytes(self, out_features: int, in_features: int, scale_bytes: int = 2) -> int:
        """Bytes of the weight, its scales, zero points and (where it is packed) shape in a checkpoint."""
        rows = 1 if self.strategy == "tensor" else out_features
        if not self.packed:
            return out_features * in_features + rows * scale_bytes
        columns = self.scale_columns(in_features)
        packed = out_features * -(-in_features * self.bits // 32) * 4
        zero_points = 0
        if not self.symmetric:
            zero_points = columns if self.strategy == "tensor" else -(-rows * self.bits // 32) * 4 * columns
        return packed + rows * columns * scale_bytes + zero_points + 16
