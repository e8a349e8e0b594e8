"""Residual width, planned: to how many channels the stream is cut, so that stock transformers builds the model."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from hf_shrink.architectures.binding import Binding
from hf_shrink.architectures.bound import BoundStack
from hf_shrink.architectures.portable import stock_accepts
from hf_shrink.architectures.residual import ResidualStream, find_residual
from hf_shrink.checkpoint.ties import can_untie
from hf_shrink.errors import ArchitectureError, RecipeError
from hf_shrink.plan import HiddenPlan
from hf_shrink.pruning.base import HiddenMethod
from hf_shrink.recipe import PruneStep
from hf_shrink.surgery.depth import stack_configs
from hf_shrink.surgery.hidden import width_keys
from hf_shrink.surgery.sizes import build_skeleton

TOLERANCE = 0.01  # of the blocks' parameters
MULTIPLES = (64, 32, 16, 8, 4, 2, 1)  # what kernels and quantization groups like, best first


class Narrowing(NamedTuple):
    """What is planned (None: nothing), and what the user should know."""

    plan: HiddenPlan | None
    notes: list[str]


def plan_hidden(model: PreTrainedModel, binding: Binding, step: PruneStep, method: HiddenMethod) -> Narrowing:
    """Decide how wide the residual stream stays. The model is left as it was.

    Of the widths that remove the ratio to within 1% of the blocks' parameters and that the stock config takes, the one
    that is a multiple of the largest power of two is chosen, up to 64.

    Args:
        step: with `what: hidden`; its ratio counts against all parameters of the binding's blocks.

    Raises:
        ArchitectureError: the rotation cannot be folded into this model, or its config cannot say another width.
    """
    binding.require_roles()
    assert step.ratio is not None
    stack, stream = _stream(model, binding)
    config = stack_configs(model, stack)[0]
    asked: bool | None = getattr(method, "untie", False)
    untie = (not step.refit if asked is None else asked) and stream.tied
    if untie and not can_untie(model.config):
        raise RecipeError("this family always ties its head to the embedding; set untie: false")
    if step.ratio == 0:
        return Narrowing(None, [])
    total = sum(bound.parameters for bound in binding.stacks)
    each = channel_parameters(model, stack, stream)
    wanted = stream.width - step.ratio * total / each
    if wanted < 1:
        raise RecipeError(
            f"prune.ratio {step.ratio:g} would leave nothing of the residual stream; at most "
            f"{(stream.width - 1) * each / total:.1%} of the blocks' parameters can go with it"
        )
    slack = TOLERANCE * total / each
    accepted = [
        width
        for width in _around(wanted, slack, stream.width)
        if stock_accepts(config, width_keys(stack, stream, width))
    ]
    if not accepted:
        raise ArchitectureError("the config of this family takes no other width of the residual stream than it has")
    near = [width for width in accepted if abs(width - wanted) <= slack] or accepted[:1]
    best = next(m for m in MULTIPLES if any(width % m == 0 for width in near))
    width = min((w for w in near if w % best == 0), key=lambda w: abs(w - wanted))
    _check_stock_builds(model, stack, stream, width)
    plan = HiddenPlan(stack.name, width, step.method, dict(step.options), step.refit, untie)
    return Narrowing(plan, _notes(step, (stream.width - width) * each / total, width, best, accepted))


def _stream(model: PreTrainedModel, binding: Binding) -> tuple[BoundStack, ResidualStream]:
    reasons = []
    for stack in binding.stacks:
        stream = find_residual(model, stack, tied=True)
        if isinstance(stream, ResidualStream):
            attention = stack.blocks[0].attention
            if attention is not None and attention.spec.head_size_key is not None:
                return stack, stream
            reasons.append(f"{stack.name}: its config derives the size of a head from the width of the stream")
        else:
            reasons.append(f"{stack.name}: {stream}")
    raise ArchitectureError(
        f"the residual stream of this {binding.model_type!r} model cannot be cut: {'; '.join(reasons)}. Prune its "
        "depth or width instead"
    )


def channel_parameters(model: nn.Module, stack: BoundStack, stream: ResidualStream) -> int:
    """Parameters of the blocks that one channel of the stream has."""
    inside = f"{stack.path}."
    total = 0
    for reader in stream.readers:
        if reader.norm.startswith(inside):
            total += 1 + sum(_weight(model, path).numel() // stream.width for path in reader.matrices)
    for path in stream.writers:
        biased = isinstance(model.get_submodule(path).bias, nn.Parameter)
        total += _weight(model, path).numel() // stream.width + int(biased)
    return total


def _weight(model: nn.Module, path: str) -> nn.Parameter:
    weight = model.get_submodule(path).weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _around(wanted: float, slack: float, width: int) -> Iterator[int]:
    """All widths within `slack`, nearest first; where the caller takes none of them, the next ones outwards."""
    order = sorted(range(1, width), key=lambda w: abs(w - wanted))
    yield from order[: max(int(2 * slack) + 2, 256)]


def _check_stock_builds(model: PreTrainedModel, stack: BoundStack, stream: ResidualStream, width: int) -> None:
    """Raises ArchitectureError where stock would build something else from the config than what will be there."""
    config = copy.deepcopy(model.config)
    owner = config
    for part in stack.spec.config.split(".") if stack.spec is not None and stack.spec.config else ():
        owner = getattr(owner, part)
    for key, value in width_keys(stack, stream, width).items():
        setattr(owner, key, value)
    built = {name: tuple(p.shape) for name, p in build_skeleton(model, config).named_parameters()}
    expected = narrowed_shapes(model, stream, width)
    for name, parameter in model.named_parameters():
        shape = expected.get(name, tuple(parameter.shape))
        if built.get(name) != shape:
            raise ArchitectureError(
                f"the residual stream cannot be cut to {width} channels: stock transformers would build {name} of "
                f"shape {built.get(name)} where {shape} is due"
            )


def narrowed_shapes(model: nn.Module, stream: ResidualStream, width: int) -> dict[str, tuple[int, ...]]:
    """Shapes, by name, of the parameters that are cut, once the stream has `width` channels."""
    shapes: dict[str, tuple[int, ...]] = {}
    shapes[f"{stream.embedding}.weight"] = (len(_weight(model, stream.embedding)), width)
    for reader in stream.readers:
        shapes[f"{reader.norm}.weight"] = (width,)
        for path in reader.matrices:
            shapes[f"{path}.weight"] = (_weight(model, path).shape[0], width)
    for path in stream.writers:
        shapes[f"{path}.weight"] = (width, _weight(model, path).shape[1])
        shapes[f"{path}.bias"] = (width,)
    return shapes


def _notes(step: PruneStep, removed: float, width: int, multiple: int, accepted: list[int]) -> list[str]:
    assert step.ratio is not None
    notes = []
    if abs(removed - step.ratio) > TOLERANCE:
        notes.append(
            f"asked to remove {step.ratio:.1%} of the blocks' parameters, removed {removed:.1%}: the config takes no "
            f"width of the residual stream that is nearer than {width}"
        )
    rounder = [w for w in accepted if w % 8 == 0]
    if multiple < 8:
        other = f"; {rounder[0]} would be one" if rounder else ""
        notes.append(
            f"the residual stream keeps {width} channels, no multiple of 8, which fast kernels and quantization groups "
            f"like better{other}"
        )
    return notes


def stream_widths(model: nn.Module, stream: ResidualStream, width: int) -> Mapping[str, tuple[int | None, int | None]]:
    """(out_features, in_features) of matrices and embeddings that change with the stream, None for what stays."""
    changed: dict[str, tuple[int | None, int | None]] = {stream.embedding: (None, width)}
    changed |= {path: (None, width) for reader in stream.readers for path in reader.matrices}
    return changed | dict.fromkeys(stream.writers, (width, None))
