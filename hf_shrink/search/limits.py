"""What a budget allows on one model, in bytes and seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hf_shrink.recipe import Budget
from hf_shrink.search.options import Cost

CONTEXT = 4096  # tokens in the KV cache where the budget does not say how many


@dataclass(frozen=True)
class Limits:
    """What an assignment may take.

    Attributes:
        most: by resource ("bytes", "memory", "decode", "prefill"), in bytes or seconds per token.
        dense: what the dense model takes of each of them.
        context: tokens in the KV cache, of "memory".
    """

    most: Mapping[str, float]
    dense: Mapping[str, float]
    context: int = CONTEXT

    @classmethod
    def of(cls, budget: Budget, dense: Cost, positions: int | None = None) -> Limits:
        """A budget's limits where the dense model takes `dense`, and reads at most `positions` tokens."""
        context = budget.context if budget.context is not None else min(CONTEXT, positions or CONTEXT)
        asked = {
            "bytes": budget.bytes,
            "memory": budget.memory,
            "decode": budget.decode,
            "prefill": budget.prefill,
        }
        most, takes = {}, {}
        for resource, limit in asked.items():
            if limit is not None:
                takes[resource] = amount(dense, resource, context)
                most[resource] = limit.of(takes[resource])
        return cls(most, takes, context)

    def taken(self, cost: Cost) -> dict[str, float]:
        """What a cost takes of every limited resource."""
        return {resource: amount(cost, resource, self.context) for resource in self.most}

    def hold(self, cost: Cost) -> bool:
        """Whether a cost keeps all limits."""
        return all(amount(cost, resource, self.context) <= most for resource, most in self.most.items())


def amount(cost: Cost, resource: str, context: int) -> float:
    """What a cost takes of a resource."""
    if resource == "bytes":
        return cost.bytes
    return cost.memory(context) if resource == "memory" else cost.seconds.get(resource, 0.0)
