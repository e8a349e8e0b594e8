"""Carry out a plan's transforms: rotations of the whole model before the walk, scales block by block on the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from hf_shrink.architectures.base import Stack
from hf_shrink.architectures.bound import BoundBlock, BoundStack
from hf_shrink.architectures.feeds import find_feeds
from hf_shrink.architectures.linears import matrix
from hf_shrink.architectures.residual import find_residual
from hf_shrink.calibration.walk import StackWalk
from hf_shrink.plan import Plan, Scheme, split_transform
from hf_shrink.transforms import Rotation, Scaling, ScalingCase, Transform
from hf_shrink.transforms.fold import fold_rotation, fold_scales

FOR_ACTIVATIONS = ("smooth", "shift")


def transform_notes(plan: Plan) -> tuple[str, ...]:
    """What is known of a plan's transforms before anything is changed."""
    if any(scheme.activation_bits < 16 for scheme in plan.schemes.values()):
        return ()
    idle = [name for name in (split_transform(spec)[0] for spec in plan.transforms) if name in FOR_ACTIVATIONS]
    return tuple(
        f"{name} makes activations easier to round, which this plan leaves in 16 bits; awq is meant for that"
        for name in idle
    )


def rotate(model: nn.Module, stacks: Sequence[BoundStack], transforms: Sequence[Transform]) -> list[str]:
    """Rotate every stack's residual stream where that can be folded into the weights; returns notes."""
    notes = []
    for transform in (t for t in transforms if isinstance(t, Rotation)):
        for stack in stacks:
            stream = find_residual(model, stack)
            if isinstance(stream, str):
                notes.append(f"rotate: the residual stream of the {stack.name} was not rotated: {stream}")
                continue
            fold_rotation(model, stream, transform.matrix(stream.width))
            notes.append(f"rotate: the residual stream of the {stack.name} was rotated ({stream.width} channels)")
    return notes


@dataclass
class BlockScaler:
    """Scales the inputs of a block's matrices, and remembers what could not be scaled.

    Attributes:
        schemes: by present path; feeds of which no reader is quantized are left alone.
        weighted: whether the method that follows weighs columns by their second moments.
    """

    model: nn.Module
    transforms: Sequence[Transform]
    schemes: Mapping[str, Scheme]
    weighted: bool
    refused: Counter[tuple[str, str]] = field(default_factory=Counter)
    scaled: int = 0

    @property
    def scalings(self) -> list[Scaling]:
        return [transform for transform in self.transforms if isinstance(transform, Scaling)]

    def scale(self, walk: StackWalk | None, spec: Stack | None, block: BoundBlock, stored: torch.dtype) -> None:
        """Fold the scales of every scaling transform into a dense block, each from one pass of the walk's batches.

        Args:
            walk: in front of the block; None where there is no `spec`, so that nothing can be scaled.
            stored: dtype in which the block will be kept.

        Raises:
            CalibrationError: a matrix saw no tokens, or not finite ones.
        """
        found = find_feeds(block, spec, self.model.config)  # type: ignore[arg-type]
        self.refused.update(found.refused)
        feeds = [feed for feed in found.found if any(path in self.schemes for path in feed.readers)]
        if not feeds or walk is None:
            return
        for transform in self.scalings:
            first = {feed.readers[0]: self.model.get_submodule(feed.readers[0]) for feed in feeds}
            statistics = walk.statistics(first)
            for feed in feeds:
                case = ScalingCase(
                    weights=[matrix(self.model.get_submodule(path)).float() for path in feed.readers],
                    schemes=[self.schemes.get(path) for path in feed.readers],
                    statistics=statistics[feed.readers[0]],
                    unit=feed.unit,
                    weighted=self.weighted,
                    scale_dtype=stored,
                )
                fold_scales(self.model, feed, transform.scales(case), stored)
            self.scaled += len(feeds)

    def notes(self) -> list[str]:
        """One line a reason, with the number of blocks."""
        if not self.scalings:
            return []
        lines = [f"scales of {self.scaled} inputs were folded into the weights"] if self.scaled else []
        for (roles, reason), blocks in self.refused.items():
            lines.append(f"inputs of {roles} were not scaled in {blocks} blocks: {reason}")
        return lines
