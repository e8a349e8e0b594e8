"""What goes on inside student and teacher: hidden states and attention, block beside block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_shrink.architectures.binding import bind
from hf_shrink.calibration.capture import first_output
from hf_shrink.calibration.padding import token_mask
from hf_shrink.checkpoint.record import RECORD_NAME, ShrinkRecord, read_record
from hf_shrink.errors import ArchitectureError
from hf_shrink.tuning.divergence import logit_divergence

Kept = Mapping[str, Sequence[int]]  # by stack: which of the teacher's blocks each of the student's was
SMALLEST = 1e-9  # attention below it counts as that


@dataclass(frozen=True)
class StackPair:
    """A stack of the student beside the teacher's.

    Attributes:
        name: of the stack.
        path: where the student has it; the blocks are those of the model that runs, which may not be the one that was
            paired (a copy of it, or made anew).
        dense: all blocks of the teacher.
        kept: which of the teacher's blocks each of the student's was, ascending.
    """

    name: str
    path: str
    dense: tuple[nn.Module, ...]
    kept: tuple[int, ...]

    def own(self, model: nn.Module) -> tuple[nn.Module, ...]:
        """All blocks of a student."""
        return tuple(model.get_submodule(self.path).children())

    @property
    def behind(self) -> tuple[int, ...]:
        """For each block of the student, the teacher's block in front of the next one kept: it stands for both."""
        return (*(following - 1 for following in self.kept[1:]), len(self.dense) - 1)


def pair_stacks(model: nn.Module, teacher: PreTrainedModel, kept: Kept | None = None) -> tuple[StackPair, ...]:
    """The student's stacks beside the teacher's.

    Args:
        model: the student, packed or with adapters as it may be; the teacher's modules by the same paths.
        kept: for each stack, which of the teacher's blocks the student's were; None: as the plan says that the
            student was pruned by (`shrink_record`, or shrink.json where it was loaded from).

    Raises:
        ArchitectureError: blocks are missing, and nothing says which.
    """
    kept = _kept_of(model) if kept is None else kept
    pairs = []
    for stack in bind(teacher).stacks:
        own = tuple(model.get_submodule(stack.path).children())
        dense = tuple(block.module for block in stack.blocks)
        numbers = tuple(kept.get(stack.name, range(len(dense)) if len(own) == len(dense) else ()))
        valid = len(numbers) == len(own) and list(numbers) == sorted(set(numbers) & set(range(len(dense))))
        if not valid:
            raise ArchitectureError(
                f"stack {stack.name!r} has {len(own)} blocks and the teacher's {len(dense)}, and "
                + (
                    f"the blocks kept are given as {list(numbers)}"
                    if numbers
                    else "nothing says which of them were kept"
                )
                + f"; pass kept={{{stack.name!r}: [...]}} with the teacher's number of each of the model's blocks"
            )
        pairs.append(StackPair(stack.name, stack.path, dense, numbers))
    return tuple(pairs)


def _kept_of(model: nn.Module) -> Kept:
    """What the plan of a pruned model says; empty without one."""
    record = getattr(model, "shrink_record", None)
    if record is None:
        path = Path(str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")) / RECORD_NAME
        record = read_record(path) if path.is_file() else None
    return {} if not isinstance(record, ShrinkRecord) else {n: s.kept for n, s in record.plan.stacks.items()}


@contextmanager
def watching(blocks: Sequence[nn.Module]) -> Iterator[dict[int, Tensor]]:
    """What the blocks put out in the forward pass inside, by their number: hidden states with their gradients."""
    seen: dict[int, Tensor] = {}

    def hook(number: int) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            seen[number] = first_output(output)

        return keep

    with ExitStack() as stack:
        for number, block in enumerate(blocks):
            stack.callback(block.register_forward_hook(hook(number)).remove)
        yield seen


def hidden_error(
    pair: StackPair, own: Mapping[int, Tensor], dense: Mapping[int, Tensor], batch: Any, model: nn.Module
) -> Tensor:
    """Mean over blocks and real tokens of ||own - dense||² / ||dense||²: a token with massive activations counts once.

    Args:
        own, dense: hidden states (batch, sequence, width) from `watching`.
        model: the student, which says what padded sounds become.

    Raises:
        ArchitectureError: the widths differ, or a model did not run its blocks.
    """
    total: list[Tensor] = []
    for number, behind in enumerate(pair.behind):
        if number not in own or behind not in dense:
            raise ArchitectureError(f"stack {pair.name!r} did not run on this batch; leave hidden states out")
        states, target = own[number], dense[behind].to(own[number].device)
        if states.shape != target.shape:
            raise ArchitectureError(
                f"hidden states of stack {pair.name!r} have the shape {tuple(states.shape)} and the teacher's "
                f"{tuple(target.shape)}: its stream was cut, so they cannot be compared; set hidden to 0 and learn "
                "from logits"
            )
        mask = token_mask(batch, states.shape[:2], model) if states.dim() == 3 else None
        if mask is not None:
            states, target = states[mask.to(states.device)], target[mask.to(states.device)]
        target = target.float()
        distance = (states.float() - target).square().sum(-1) / target.square().sum(-1).clamp_min(1e-30)
        total.append(distance.mean())
    return torch.stack(total).mean()


def attention_of(outputs: Any, name: str) -> tuple[Tensor | None, ...]:
    """A stack's attention weights, (batch, heads, queries, keys) a block. Raises ArchitectureError without any."""
    found = outputs.get(f"{name}_attentions") or outputs.get("attentions")
    if not found or all(part is None for part in found):
        raise ArchitectureError(
            f"stack {name!r} gave no attention weights; load both models with attn_implementation='eager', or set "
            "attention to 0"
        )
    return tuple(found)


def attention_divergence(
    pair: StackPair, own: Sequence[Tensor | None], dense: Sequence[Tensor | None], batch: Any, model: nn.Module
) -> Tensor:
    """Mean KL divergence of the student's attention from the teacher's, over blocks, heads and real queries.

    Blocks whose heads were pruned are left out: nothing says which of the teacher's heads theirs answer to.

    Raises:
        ArchitectureError: no block has the teacher's number of heads.
    """
    if len(own) != len(pair.kept) or len(dense) != len(pair.dense):
        raise ArchitectureError(
            f"stack {pair.name!r} has blocks without attention, so its attention cannot be compared; set attention to 0"
        )
    total = []
    for weights, number in zip(own, pair.kept, strict=True):
        target = dense[number]
        if weights is None or target is None or weights.shape != target.shape:
            continue
        mask = token_mask(batch, torch.Size((weights.shape[0], weights.shape[2])), model)
        rows, wanted = weights.transpose(1, 2), target.to(weights.device).transpose(1, 2)
        if mask is not None:
            rows, wanted = rows[mask.to(rows.device)], wanted[mask.to(rows.device)]
        keys = rows.shape[-1]
        log_rows, log_wanted = (x.reshape(-1, keys).float().clamp_min(SMALLEST).log() for x in (rows, wanted))
        total.append(logit_divergence(log_rows, log_wanted))
    if not total:
        raise ArchitectureError(
            f"no block of stack {pair.name!r} has the teacher's number of heads, so there is no attention to compare; "
            "set attention to 0"
        )
    return torch.stack(total).mean()
