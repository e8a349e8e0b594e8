"""When enough has been removed: a number of items, or the share of the blocks' parameters that comes nearest."""

from __future__ import annotations

from collections.abc import Sequence

from hf_shrink.errors import RecipeError
from hf_shrink.pruning.items import Items
from hf_shrink.recipe import PruneStep


class Goal:
    """What a depth step asks for.

    Attributes:
        sizes: what every item takes towards it: 1 where items are counted, else its parameters.

    Raises:
        RecipeError: it cannot be reached.
    """

    def __init__(self, step: PruneStep, items: Items) -> None:
        self._step = step
        self._items = items
        counted = step.blocks is not None
        self.sizes = tuple(1 if counted else item.parameters for item in items.all)
        most = self._largest_removal()
        possible = sum(self.sizes[number] for number in most)
        if step.blocks is not None:
            self._target = float(step.blocks)
            if step.blocks > len(most):
                raise RecipeError(
                    f"prune.blocks {step.blocks} would leave a stack of this model without blocks it needs; at most "
                    f"{len(most)} of its {len(items.all)} {self._what} can go"
                )
            return
        assert step.ratio is not None
        self._target = step.ratio * items.total
        if self._target > possible + min(self.sizes, default=0) / 2:
            raise RecipeError(
                f"prune.ratio {step.ratio:g} would leave a stack of this model without blocks it needs; at most "
                f"{int(1000 * possible / items.total) / 10:g}% of the block parameters can go"
                + ("" if step.parts == "blocks" else f" as {self._what}")
            )

    @property
    def _what(self) -> str:
        return {"blocks": "blocks", "attention": "attentions", "mlp": "MLPs", "any": "attentions and MLPs"}[
            self._step.parts
        ]

    @property
    def about(self) -> int:
        """Roughly how many items go."""
        return max(1, round(self._target * len(self.sizes) / max(sum(self.sizes), 1)))

    def _largest_removal(self) -> list[int]:
        removed: list[int] = []
        order = sorted(range(len(self.sizes)), key=lambda number: (-self.sizes[number], number))
        while (
            more := next((n for n in order if n not in removed and self._items.allowed([*removed, n])), None)
        ) is not None:
            removed.append(more)
        return removed

    def candidates(self, removed: Sequence[int]) -> tuple[int, ...]:
        """The items that may go next, ascending: those that bring what is removed nearer to the goal."""
        gone = sum(self.sizes[number] for number in removed)
        return tuple(
            number
            for number in range(len(self.sizes))
            if number not in removed
            and gone + self.sizes[number] / 2 < self._target
            and self._items.allowed([*removed, number])
        )

    def notes(self, removed: Sequence[int]) -> list[str]:
        """What the user should know where the goal was missed by more than 1%."""
        if self._step.ratio is None:
            return []
        share = sum(self.sizes[number] for number in removed) / self._items.total
        if abs(share - self._step.ratio) <= 0.01:
            return []
        return [
            f"asked to remove {self._step.ratio:.1%} of the blocks' parameters, removed {share:.1%}: {len(removed)} "
            f"whole {self._what} come nearest"
        ]
