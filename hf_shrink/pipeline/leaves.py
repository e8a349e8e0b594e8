"""What a plan leaves of the matrices: which are gone, and how large the others are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from hf_shrink.architectures.binding import Binding
from hf_shrink.architectures.linears import is_matrix, shape
from hf_shrink.architectures.residual import find_residual
from hf_shrink.plan import BlockPlan, Plan
from hf_shrink.pruning.plan_hidden import stream_widths
from hf_shrink.surgery import consumer_cuts, cut_shapes


def removed_by(path: str, binding: Binding | None, plan: Plan) -> bool:
    """Whether a module lies in a block, in a part of one, or in an expert, that the plan removes."""
    for name, stack in plan.stacks.items():
        assert binding is not None
        for block in binding.stack(name).blocks:
            if not path.startswith(block.path + "."):
                continue
            own = stack.blocks.get(block.index, BlockPlan())
            if any(path in getattr(block, part).modules for part in own.removed or ()):
                return True
            kept = own.experts
            if block.experts is not None and kept is not None and path.startswith(block.experts.path + "."):
                return int(path.removeprefix(block.experts.path + ".").partition(".")[0]) not in kept
            return block.index not in stack.kept
    return False


def without_removed(plan: Plan, binding: Binding | None) -> Plan:
    """The plan without what it says of modules that it removes itself."""

    def stays(path: str) -> bool:
        return not removed_by(path, binding, plan)

    weights = plan.weights
    if weights is not None:
        amounts = {path: a for path, a in weights.amounts.items() if stays(path.rpartition(".")[0])}
        weights = replace(weights, amounts=amounts)
    schemes = {path: scheme for path, scheme in plan.schemes.items() if stays(path)}
    formats = {path: form for path, form in plan.formats.items() if stays(path)}
    return replace(plan, schemes=schemes, formats=formats, weights=weights)


def narrowed_by(model: nn.Module, binding: Binding | None, plan: Plan) -> dict[str, int]:
    """The new input width of every matrix that reads something which the plan removes, by its path in the source."""
    widths = {path: width for path, (_, width) in _stream_sizes(model, binding, plan).items() if width is not None}
    for name, stack in plan.stacks.items():
        assert binding is not None
        for block in binding.stack(name).blocks:
            cuts = consumer_cuts(block, stack.blocks.get(block.index, BlockPlan()))
            widths.update({path: kept.numel() for path, kept in cuts.items()})
    return widths


def cut_by(model: nn.Module, binding: Binding | None, plan: Plan) -> dict[str, tuple[int, int]]:
    """The new (out_features, in_features) of every matrix that the plan cuts, by its path in the source."""
    shapes: dict[str, tuple[int, int]] = {}
    for name, stack in plan.stacks.items():
        assert binding is not None
        for block in binding.stack(name).blocks:
            shapes |= cut_shapes(block, stack.blocks.get(block.index, BlockPlan()))
    for path, (rows, columns) in _stream_sizes(model, binding, plan).items():
        module = model.get_submodule(path)
        if is_matrix(module):
            old = shapes.get(path, shape(module))
            shapes[path] = rows or old[0], columns or old[1]
    return shapes


def _stream_sizes(model: nn.Module, binding: Binding | None, plan: Plan) -> Mapping[str, tuple[int | None, int | None]]:
    """What the plan makes of matrices and embeddings on a residual stream that it cuts, by path in the source."""
    if plan.hidden is None or binding is None:
        return {}
    stream = find_residual(model, binding.stack(plan.hidden.stack), tied=True)
    return {} if isinstance(stream, str) else stream_widths(model, stream, plan.hidden.width)
