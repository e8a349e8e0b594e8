"""What a model is made of and what can be taken out of it, from shapes alone: a model on the meta device will do."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from hf_shrink.architectures.binding import bind
from hf_shrink.architectures.bound import BoundAttention, BoundBlock, BoundStack
from hf_shrink.architectures.experts import expert_rows
from hf_shrink.architectures.linears import is_matrix, shape
from hf_shrink.architectures.portable import mlp_keys, portable_head_counts, stack_config
from hf_shrink.architectures.removable import alike, removable, span

Row = tuple[str, str, int, int]


@dataclass(frozen=True)
class Matrix:
    """One weight matrix.

    Attributes:
        path: inside a block relative to it, else the full path.
        roles: what it does, such as ("query", "key", "value") when fused; empty for one without a role.
        shape: (out_features, in_features); (rows, width) of an embedding.
        parameters, bytes: with its bias; 0 for a weight that is tied to one counted before.
    """

    path: str
    roles: tuple[str, ...]
    shape: tuple[int, int]
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Heads:
    """Units of one attention: KV groups with `per_group` query heads each, of `size` features."""

    kv_groups: int
    per_group: int
    size: int


@dataclass(frozen=True)
class Block:
    """One block. What it has none of, or whose roles are unknown, is None.

    Attributes:
        experts, expert_channels: their number, and how many channels each has.
    """

    index: int
    matrices: tuple[Matrix, ...]
    parameters: int
    bytes: int
    heads: Heads | None = None
    cross_heads: Heads | None = None
    channels: int | None = None
    experts: int | None = None
    expert_channels: int | None = None

    @property
    def form(self) -> tuple[object, ...]:
        """Equal for blocks of the same sizes."""
        units = self.heads, self.cross_heads, self.channels, self.experts, self.expert_channels
        return self.matrices, self.parameters, self.bytes, units


@dataclass(frozen=True)
class Stack:
    """One row of blocks, and what can be removed from it.

    Attributes:
        portable_heads: (KV groups, query heads in each) that stock transformers can build when all blocks have them;
            the first is what is there now. Any other number, the same in every group of a block, is uneven.
        heads_fixed: why no heads can be removed; None when they can.
        heads_tied: all blocks must keep the same heads.
        portable_channels: whether any number of channels, the same in all blocks, is portable.
        portable_expert_channels: the same of the experts' channels.
        depth_fixed: why no blocks can be removed; None when they can.
        first_stays: the first block is built differently and is never removed.
    """

    name: str
    path: str
    blocks: tuple[Block, ...]
    portable_heads: tuple[tuple[int, int], ...] = ()
    heads_fixed: str | None = None
    heads_tied: bool = False
    portable_channels: bool = False
    portable_expert_channels: bool = False
    depth_fixed: str | None = None
    first_stays: bool = False

    @property
    def parameters(self) -> int:
        return sum(block.parameters for block in self.blocks)

    @property
    def bytes(self) -> int:
        return sum(block.bytes for block in self.blocks)


@dataclass(frozen=True)
class ModelDescription:
    """What `describe` finds.

    Attributes:
        model_class: name of the class.
        prunable: False for a model type without a role table, which can be quantized only.
        outside: embeddings and matrices that are not in a block, of `stacks` or of another tower.
        parameters, bytes: of the whole model, tied weights once, buffers not counted.
    """

    model_type: str
    model_class: str
    prunable: bool
    stacks: tuple[Stack, ...]
    outside: tuple[Matrix, ...]
    parameters: int
    bytes: int

    def rows(self) -> list[Row]:
        """(part, shape, parameters, bytes) of every kind of part, for a table; blocks of the same sizes together."""
        rows: list[Row] = []
        for stack in self.stacks:
            for blocks in alike(stack.blocks):
                count, first = len(blocks), blocks[0]
                rows.append((f"{stack.name} {span(blocks)}", "", count * first.parameters, count * first.bytes))
                rows += [_row(matrix, count) for matrix in first.matrices]
        rows += [_row(matrix, 1) for matrix in self.outside]
        rest_parameters = self.parameters - sum(s.parameters for s in self.stacks)
        rest_bytes = self.bytes - sum(s.bytes for s in self.stacks)
        rest_parameters -= sum(matrix.parameters for matrix in self.outside)
        rest_bytes -= sum(matrix.bytes for matrix in self.outside)
        if rest_parameters:
            rows.append(("everything else outside the blocks", "", rest_parameters, rest_bytes))
        rows.append(("whole model", "", self.parameters, self.bytes))
        return rows

    def to_text(self) -> str:
        """The table, and what can be removed in words."""
        cells = [(part, size, f"{parameters:,}", _size(count)) for part, size, parameters, count in self.rows()]
        cells.insert(0, ("part", "shape", "parameters", "bytes"))
        widths = [max(len(row[i]) for row in cells) for i in range(4)]
        lines = [f"{self.model_class} ({self.model_type})", ""]
        for part, size, parameters, count in cells:
            aligned = (
                part.ljust(widths[0]),
                size.rjust(widths[1]),
                parameters.rjust(widths[2]),
                count.rjust(widths[3]),
            )
            lines.append("  ".join(aligned).rstrip())
        lines.append("")
        if not self.prunable:
            lines.append("No role table for this model type: it can be quantized, not pruned.")
        for stack in self.stacks if self.prunable else ():
            lines += [f"{stack.name} ({stack.path}):", *(f"  {line}" for line in removable(stack))]
        return "\n".join(lines)


def describe(model: PreTrainedModel) -> ModelDescription:
    """What `model` is made of. Only shapes and dtypes are looked at.

    Raises:
        ArchitectureError: the model has no repeated blocks, or does not match the table of its family.
    """
    binding = bind(model)
    seen: set[int] = set()
    stacks = tuple(_describe_stack(model, stack, seen) for stack in binding.stacks)
    outside = tuple(
        _matrix(module, path, (), seen)
        for path, module in model.named_modules()
        if (is_matrix(module) or isinstance(module, nn.Embedding)) and not re.search(r"\.\d+\.", path)
    )
    parameters = list(model.parameters())
    return ModelDescription(
        model_type=binding.model_type,
        model_class=type(model).__name__,
        prunable=binding.family is not None,
        stacks=stacks,
        outside=outside,
        parameters=sum(p.numel() for p in parameters),
        bytes=sum(p.numel() * p.element_size() for p in parameters),
    )


def _describe_stack(model: PreTrainedModel, stack: BoundStack, seen: set[int]) -> Stack:
    blocks = tuple(_describe_block(block, seen) for block in stack.blocks)
    spec, first = stack.spec, stack.blocks[0]
    if spec is None:
        return Stack(stack.name, stack.path, blocks)
    config = stack_config(model.config, spec)
    attention = first.attention
    return Stack(
        name=stack.name,
        path=stack.path,
        blocks=blocks,
        portable_heads=tuple(portable_head_counts(attention, config)) if attention is not None else (),
        heads_fixed=attention.spec.fixed if attention is not None else None,
        heads_tied=attention is not None and attention.spec.tied,
        portable_channels=_portable_channels(stack, config),
        portable_expert_channels=spec.experts is not None and spec.experts.channels is not None,
        depth_fixed=spec.depth_fixed,
        first_stays=spec.first_is_special,
    )


def _portable_channels(stack: BoundStack, config: PretrainedConfig) -> bool:
    """Whether one config key says the number of channels of all blocks."""
    mlps = [block.mlp for block in stack.blocks if block.mlp is not None]
    keys = {mlp.spec.channels for mlp in mlps}
    return len(keys) == 1 and mlp_keys(mlps[0].spec, config, mlps[0].channels) is not None


def _describe_block(block: BoundBlock, seen: set[int]) -> Block:
    parameters = list(block.module.parameters())
    matrices = []
    if block.experts is not None:
        matrices += [Matrix(*row) for row in expert_rows(block.experts, block.path)]
    for path, roles in block.roles.items():
        if block.experts is not None and path in block.experts.matrices:
            continue
        relative = path.removeprefix(f"{block.path}.")
        matrices.append(_matrix(block.module.get_submodule(relative), relative, roles, seen))
    return Block(
        index=block.index,
        matrices=tuple(matrices),
        parameters=sum(p.numel() for p in parameters),
        bytes=sum(p.numel() * p.element_size() for p in parameters),
        heads=_heads(block.attention),
        cross_heads=_heads(block.cross_attention),
        channels=block.mlp.channels if block.mlp is not None else None,
        experts=block.experts.count if block.experts is not None else None,
        expert_channels=block.experts.channels if block.experts is not None else None,
    )


def _heads(attention: BoundAttention | None) -> Heads | None:
    if attention is None:
        return None
    return Heads(attention.kv_heads, attention.heads_per_group, attention.head_size)


def _matrix(module: nn.Module, path: str, roles: tuple[str, ...], seen: set[int]) -> Matrix:
    size = (module.num_embeddings, module.embedding_dim) if isinstance(module, nn.Embedding) else shape(module)
    own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
    seen.update(id(p) for p in own)
    return Matrix(path, roles, size, sum(p.numel() for p in own), sum(p.numel() * p.element_size() for p in own))


def _row(matrix: Matrix, count: int) -> Row:
    name = f"{matrix.path} ({', '.join(matrix.roles)})" if matrix.roles else matrix.path
    note = "" if matrix.parameters else ", tied"
    shown = f"{matrix.shape[0]} x {matrix.shape[1]}{note}"
    return (f"  {name}" if count > 1 or matrix.roles else name, shown, matrix.parameters * count, matrix.bytes * count)


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "KB", "MB"):
        if value < 1000:
            return f"{value:.4g} {unit}"
        value /= 1000
    return f"{value:.4g} GB"
