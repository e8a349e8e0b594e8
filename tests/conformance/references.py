"""What the encoder tests compare with: masked and bypassed models; and the plans that they apply."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from hf_shrink.architectures import bind
from hf_shrink.architectures.bound import BoundAttention, BoundStack
from hf_shrink.plan import BlockPlan, Plan, StackPlan


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Every tensor that the model returns, without its KV cache."""

    def tensors(output: Any) -> Iterator[Tensor]:
        if isinstance(output, Tensor):
            yield output
        elif isinstance(output, ModelOutput):
            for value in output.values():
                yield from tensors(value)

    with torch.no_grad():
        return list(tensors(model(**inputs)))


def assert_near(actual: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    assert len(actual) == len(expected) > 0
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert (a - e).abs().max() <= tolerance * max(1.0, float(e.abs().max()))


def far_apart(first: list[Tensor], second: list[Tensor]) -> bool:
    return any((a - b).abs().max() > 1e-2 for a, b in zip(first, second, strict=True))


def plan_for(model: PreTrainedModel, *, heads: bool, uneven: bool) -> Plan:
    """Drop two heads and all but 40 channels everywhere, or other numbers in every block."""
    stacks = {}
    for stack in bind(model).stacks:
        blocks = {}
        for block in stack.blocks:
            dropped = 2
            if uneven and block.attention.spec.tied:  # blocks that share a position bias keep the same heads
                dropped = {"encoder": 2, "decoder": 3}[stack.name]
            elif uneven:
                dropped = 1 + block.index % 2
            first = 0 if block.attention.spec.tied else block.index
            channels = [c for c in range(block.mlp.channels) if (c + block.index) % 7 != 3]
            blocks[block.index] = BlockPlan(
                query_heads=kept_heads(block.attention, dropped, first) if heads else None,
                cross_heads=kept_heads(block.cross_attention, dropped, first + 1)
                if heads and block.cross_attention
                else None,
                channels=tuple(channels[: 40 - 3 * block.index if uneven else 40]),
            )
        stacks[stack.name] = StackPlan(tuple(range(len(stack.blocks))), blocks)
    return Plan(model.config.model_type, stacks)


def kept_heads(attention: BoundAttention, dropped: int, first: int) -> tuple[int, ...]:
    gone = {(first + i) % attention.heads for i in range(dropped)}
    return tuple(h for h in range(attention.heads) if h not in gone)


def masked(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """The dense model with zero columns in `output` and `down` for everything that the plan removes."""
    model = copy.deepcopy(model)
    for stack in bind(model).stacks:
        for block in stack.blocks:
            kept = plan.stacks[stack.name].blocks[block.index]
            for part, heads in ((block.attention, kept.query_heads), (block.cross_attention, kept.cross_heads)):
                if part is not None and heads is not None:
                    weight = block.module.get_submodule(part.spec.output).weight
                    for head in set(range(part.heads)) - set(heads):
                        weight.data[:, head * part.head_size : (head + 1) * part.head_size] = 0
            down = block.module.get_submodule(block.mlp.spec.down).weight
            down.data[:, [c for c in range(block.mlp.channels) if c not in kept.channels]] = 0
    return model


def bypass(stack: BoundStack, removed: set[int]) -> None:
    """Let blocks hand their hidden states through, with whatever else they return."""
    for block in stack.blocks:
        if block.index not in removed:
            continue

        def forward(hidden_states: Tensor, *args: Any, real: Any = block.module.forward, **kwargs: Any) -> Any:
            output = real(hidden_states, *args, **kwargs)
            return (hidden_states, *output[1:]) if isinstance(output, tuple) else hidden_states

        block.module.forward = forward
