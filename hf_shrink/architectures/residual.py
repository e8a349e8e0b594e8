"""Everything that reads or writes a stack's residual stream, where a rotation of it can be folded into the weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from hf_shrink.architectures.base import Residual
from hf_shrink.architectures.bound import BoundAttention, BoundBlock, BoundMlp, BoundStack
from hf_shrink.architectures.feeds import norm_path
from hf_shrink.architectures.linears import is_matrix, shape

TIED = (
    "the head shares its weight with the embedding, and only one of them may take the last norm's weight; name the "
    "head in quantize.overrides, for example {lm_head: {scheme: W8A16}}, and it gets a weight of its own"
)


@dataclass(frozen=True)
class Reader:
    """A norm and the matrices that alone read it, all by path."""

    norm: str
    matrices: tuple[str, ...]


@dataclass(frozen=True)
class ResidualStream:
    """A residual stream of `width` channels.

    Attributes:
        embedding: path of the embedding that writes it first.
        readers: all that read it, the last norm with the model's heads included.
        writers: paths of the matrices that add to it.
        offset: what norms add to their stored weight.
        tied: whether the head's weight is the embedding's.
        spec: the family's declaration.
    """

    width: int
    embedding: str
    readers: tuple[Reader, ...]
    writers: tuple[str, ...]
    offset: float
    tied: bool
    spec: Residual


def find_residual(model: nn.Module, stack: BoundStack, *, tied: bool = False) -> ResidualStream | str:
    """The stack's residual stream; where it cannot be rotated, the reason.

    `tied`: a head that shares its weight with the embedding is no reason against it.

    Everything in the model that holds a parameter must have its place, so that nothing is forgotten.
    """
    if stack.spec is None or not isinstance(model, PreTrainedModel):
        return "its family has no role table"
    declared = stack.spec.residual
    if isinstance(declared, str):
        return declared
    beside = stack.path.rpartition(".")[0]
    embedding, last = (f"{beside}.{p}" if beside else p for p in (declared.embedding, declared.norm))
    modules = dict(model.named_modules())
    heads = tuple(path for path in declared.heads if path in modules and is_matrix(modules[path]))
    if not heads:
        return "the model has no head: it returns the residual stream itself"
    if embedding not in modules or last not in modules:
        return f"the model has no {embedding if embedding not in modules else last}"
    known = {embedding, last, *heads}
    readers, writers = [], []
    for block in stack.blocks:
        found = _block_readers(block)
        if isinstance(found, str):
            return found
        readers += found
        writers += [part.slot(role).path for part, role in ((block.attention, "output"), (block.mlp, "down")) if part]
        known |= _inner(block)
    readers.append(Reader(last, heads))
    known |= {path for reader in readers for path in (reader.norm, *reader.matrices)} | set(writers)
    for name, _ in model.named_parameters(remove_duplicate=False):
        if name.rpartition(".")[0] not in known:
            return f"{name} has no known place in the residual stream"
    is_tied = any(modules[path].weight is modules[embedding].weight for path in heads)
    if is_tied and not tied:
        return TIED
    if any(isinstance(modules[r.norm], nn.LayerNorm) or hasattr(modules[r.norm], "bias") for r in readers):
        return "its norms do more than scale"
    width = int(modules[embedding].weight.shape[1])
    if any(shape(modules[path])[1] != width for reader in readers for path in reader.matrices):
        return "not everything that reads the residual stream has its width"
    offset = stack.spec.norm_offset
    return ResidualStream(width, embedding, tuple(readers), tuple(writers), offset, is_tied, declared)


def _block_readers(block: BoundBlock) -> list[Reader] | str:
    if block.attention is None or block.mlp is None or block.cross_attention is not None:
        return "its blocks are not one attention and one MLP with known roles"
    into = ("up",) if block.mlp.spec.gate is None else ("gate", "up")
    parts: list[tuple[BoundAttention | BoundMlp, tuple[str, ...]]]
    parts = [(block.attention, ("query", "key", "value")), (block.mlp, into)]
    readers = []
    for part, names in parts:
        norm = norm_path(block, part)
        if norm is None:
            return f"no norm with a weight feeds {', '.join(names)} of {block.path} alone"
        readers.append(Reader(norm, tuple(dict.fromkeys(part.slot(name).path for name in names))))
    if readers[0].norm == readers[1].norm:
        return [Reader(readers[0].norm, readers[0].matrices + readers[1].matrices)]
    return readers


def _inner(block: BoundBlock) -> set[str]:
    """Modules inside the attention that are no matrices: they work on heads, behind what reads the residual stream."""
    assert block.attention is not None
    owner = block.attention
    return {f"{owner.path}.{name}" for name, module in owner.module.named_modules() if name and not is_matrix(module)}
