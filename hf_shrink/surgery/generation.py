"""Keep the generation config true: what it says of a decoder's blocks and heads, by their numbers."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from hf_shrink.architectures.binding import family_of
from hf_shrink.plan import BlockPlan, Plan, StackPlan


def settle_generation(model: PreTrainedModel, plan: Plan) -> list[str]:
    """Let the generation config name blocks and heads as `plan` has left them; notes on those that are gone.

    Call it once, when the plan has been carried out: it names them as in the source.
    """
    config, family = getattr(model, "generation_config", None), family_of(model)
    notes = []
    for stack in family.stacks if config is not None and family is not None else ():
        for key in stack.head_lists if stack.name in plan.stacks else ():
            pairs = getattr(config, key, None)
            if not pairs:
                continue
            left = _left(pairs, plan.stacks[stack.name])
            if left:
                setattr(config, key, left)
            else:
                delattr(config, key)
            if len(left) < len(pairs):
                what = f"{len(left)} of {len(pairs)} pairs in" if left else "nothing, so it loses the key"
                notes.append(f"of the heads that the generation config names, the plan leaves {what} {key}")
    return notes


def _left(pairs: Sequence[Sequence[int]], plan: StackPlan) -> list[list[int]]:
    """The pairs [block, head] that are left, by their new numbers."""
    places = {source: place for place, source in enumerate(plan.kept)}
    blocks = {source: plan.blocks.get(source, BlockPlan()) for source in plan.kept}
    if any("cross_attention" in (block.removed or ()) for block in blocks.values()):
        return []  # transformers numbers the weights of the attentions that are there, and wants one of every block
    left = []
    for block, head in pairs:
        kept = blocks[block].cross_heads if block in blocks else ()
        if kept is None:
            left.append([places[block], head])
        elif head in kept:
            left.append([places[block], kept.index(head)])
    return left
