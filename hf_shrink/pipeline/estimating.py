"""What a run will take of disk, memory and time, roughly, before it begins."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_shrink.architectures.binding import bind
from hf_shrink.architectures.linears import is_matrix, shape
from hf_shrink.errors import CheckpointError
from hf_shrink.pipeline.recipes import plan_method, plan_transforms, plan_weights_method
from hf_shrink.plan import Plan

INTERPRETER = 500 * 10**6  # bytes of Python, torch and transformers themselves
WALKS = 1.6  # the compressed model's batches, and half of them or so through the dense blocks too
PROBE = 768  # width of the matrices that tell how fast this machine multiplies


@dataclass(frozen=True)
class Needs:
    """An upper bound in bytes, and a guess in seconds.

    Attributes:
        output: of the new weights.
        disk: of everything beside the source, while the run goes on.
        memory: at the most.
        seconds: of calibrating and solving, on this machine as it is now.
        tunes: whether something is tuned afterwards, for as long as the recipe lets it.
        whole: which step has the whole model in memory at once; None: one block at a time, all along.
    """

    output: int
    disk: int
    memory: int
    seconds: float
    whole: str | None = None
    tunes: bool = False

    def summary(self) -> str:
        """One line."""
        whole = "" if self.whole is None else f" ({self.whole} has the whole model in memory)"
        besides = ", tuning besides" if self.tunes else ""
        return (
            f"about {_size(self.output)} of weights; at most {_size(self.disk)} of disk while it runs and "
            f"{_size(self.memory)} of memory{whole}; roughly {_duration(self.seconds)} of calibrating and solving "
            f"here{besides}"
        )

    def check_disk(self, folder: Path) -> None:
        """Raises CheckpointError where the disk of `folder` has less left."""
        free = shutil.disk_usage(folder).free
        if free < self.disk:
            raise CheckpointError(
                f"the run needs up to {_size(self.disk)} of disk beside {folder}, which has {_size(free)} left; make "
                "room, or give an output folder on another disk"
            )


def estimate(model: nn.Module, plan: Plan, tokens: int, max_memory: int) -> Needs:
    """What carrying out `plan` on a dense `model`, with so many tokens of calibration, takes."""
    blocks = [block.module for stack in (*bind(model).towers, *bind(model).stacks) for block in stack.blocks]
    inside = {id(p) for block in blocks for p in block.parameters()}
    outside = sum(p.nbytes for p in model.parameters() if id(p) not in inside)
    output = plan.search["bytes"] if "bytes" in plan.search else _output(model, plan)
    solvers = plan_method(plan), plan_weights_method(plan), *plan_transforms(plan)
    walks = plan.refit or any(s is not None and s.needs_statistics for s in solvers)
    tokens = tokens if walks else 0
    widest = max((shape(m)[1] for block in blocks for m in block.modules() if is_matrix(m)), default=0)
    narrow = min((shape(m)[1] for block in blocks for m in block.modules() if is_matrix(m)), default=0)
    states = int(4 * tokens * narrow * WALKS)
    # In float32: the block, its dense twin, and what a solver holds of the largest matrices' second moments.
    largest = max((4 * sum(p.numel() for p in block.parameters()) for block in blocks), default=0)
    moments = 28 * widest**2 if walks else 0
    whole = whole_model_step(plan)
    if whole is not None:
        moments += sum(p.nbytes for p in model.parameters())
    work = sum(_operations(m, tokens) for block in blocks for m in block.modules() if is_matrix(m))
    return Needs(
        output=output,
        disk=2 * output + 6 * states,
        memory=INTERPRETER + outside + 2 * largest + moments + max_memory,
        seconds=work / _rate() if walks else 0.0,
        whole=whole,
        tunes=bool(plan.tune),
    )


def whole_model_step(plan: Plan) -> str | None:
    """The step of a plan that cannot work block by block; None where all can."""
    if plan.tune:
        return "tune"
    return f"method: {plan.method}" if plan.formats else None


def _output(model: nn.Module, plan: Plan) -> int:
    """Bytes of the new weights, as if everything were kept; what the plan quantizes in its bits."""
    cast = None if plan.dtype == "keep" else getattr(torch, plan.dtype)

    def stored(tensor: Tensor) -> int:
        return tensor.numel() * (cast if cast is not None and tensor.is_floating_point() else tensor.dtype).itemsize

    # By identity: an embedding that a head shares is one weight, stored once.
    weights = _weights(model)
    saved: dict[int | str, int] = {
        id(weight): stored(weight) - _packed(weight.numel(), plan.bits[path])
        for path, weight in weights.items()
        if path in plan.bits
    }
    for experts in (block.experts for block in bind(model).blocks):
        for path, role in experts.matrices.items() if experts is not None else ():
            if experts is not None and path in plan.bits and path not in weights:  # a part of a 3D parameter
                size = math.prod(experts.shapes[role])
                parameter = next(experts.module.parameters())
                saved[path] = stored(parameter) * size // parameter.numel() - _packed(size, plan.bits[path])
    return sum(stored(p) for p in model.parameters()) - sum(saved.values())


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        path: module.weight
        for path, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), Tensor) and module.weight.dim() == 2
    }


def _packed(count: int, bits: int) -> int:
    """Bytes of so many weights in so many bits, with a scale of 16 bits for every 32."""
    return count * bits // 8 + count // 16


def tokens_of(batch: Mapping[str, Any]) -> int:
    """How many positions of a stack a batch has."""
    sizes = [value.shape[:2].numel() for value in batch.values() if isinstance(value, Tensor) and value.dim() > 1]
    return max(sizes, default=0)


def _operations(module: nn.Module, tokens: int) -> float:
    """Multiplications of walking a matrix and of solving it by second moments."""
    rows, columns = shape(module)
    return float(tokens * rows * columns * WALKS * 2 + tokens * columns**2 + 4 * columns**3 + 8 * rows * columns**2)


def _rate() -> float:
    """Multiplications a second in float32, of a large product."""
    a = torch.ones(PROBE, PROBE)
    a @ a
    since = time.perf_counter()
    a @ a
    return float(PROBE**3 / max(time.perf_counter() - since, 1e-9))


def _size(amount: int) -> str:
    return f"{amount / 1e9:.1f} GB" if amount >= 10**9 else f"{amount / 1e6:.0f} MB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
