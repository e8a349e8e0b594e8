"""Cut the residual stream to fewer channels: its directions are chosen, folded into the weights, and the rest dropped.

Row vectors x of the stream become c x diag(t) Q, with Q (width, kept) of orthonormal columns, t channel scales (1 but
for tied heads) and c = sqrt(kept / width). A norm divides by the root *mean* square: c makes the mean over the kept
channels the mean over all of them, so that epsilon means what it did; what reads the norms takes 1 / c.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_shrink.architectures.bound import BoundStack
from hf_shrink.architectures.linears import matrix, set_matrix
from hf_shrink.architectures.residual import Reader, ResidualStream
from hf_shrink.residence import rest_at
from hf_shrink.surgery.depth import stack_configs
from hf_shrink.surgery.sizes import build_skeleton

SMALLEST = 0.25  # of a norm's mean weight: smaller and negative ones have no root to scale a channel by
LOUD = 4.0  # times the mean energy: scaling such a channel would change the norm of the stream too much


@dataclass(frozen=True)
class Slice:
    """How a residual stream is cut.

    Attributes:
        scale: t, float64 (width,).
        embedding: what the embedding is multiplied by in place of t, float64 (width,).
        basis: Q, float64 (width, kept).
        gain: by norm, the root mean of what `scale` does to the squared norm of what it sees; readers take it back.
        last: the weight that the last norm keeps where the head stays tied to the embedding; None: folded into heads.
    """

    scale: Tensor
    embedding: Tensor
    basis: Tensor
    gain: dict[str, float]
    last: float | None

    @property
    def shrinking(self) -> float:
        """c."""
        return float((self.basis.shape[1] / self.basis.shape[0]) ** 0.5)

    def stream(self, hidden: Tensor) -> Tensor:
        """What becomes of hidden states (..., width): (..., kept), in their dtype."""
        fold = self.scale[:, None] * self.basis * self.shrinking
        return hidden @ fold.to(hidden)


def tied_scale(weight: Tensor, energy: Tensor) -> tuple[Tensor, Tensor, float]:
    """Scales that put the last norm's weight into a head that stays tied to the embedding: t, the embedding's, and g.

    What the head reads is scaled by g t and its weight by the embedding's e, so that g t e is the norm's weight. Where
    a channel can have t = e, the root, embedding and head are both right; the norms measure a stream that is a little
    different. Channels that carry much of its energy keep t = 1: their embedding is off instead.

    Args:
        weight: (width,), the offset added.
        energy: (width,), the channels' mean squares in what norms pass on.

    Returns:
        t and e, float64 (width,), and g.
    """
    weight, energy = weight.double(), energy.double()
    mean = float(weight.abs().mean())
    fixed = (energy > LOUD * energy.mean()) | (weight < SMALLEST * mean)
    scale = torch.where(fixed, 1.0, (weight / mean).clamp_min(SMALLEST).sqrt())
    return scale, weight / mean / scale, mean


def slice_stream(model: PreTrainedModel, stack: BoundStack, stream: ResidualStream, how: Slice) -> None:
    """Cut the stream in place: norms' weights into their readers, `how` into everything, sizes into the config."""
    into = how.scale[:, None] * how.basis * how.shrinking  # (width, kept): what writes the stream
    embedded = how.embedding[:, None] * how.basis * how.shrinking
    with torch.no_grad():
        for reader in stream.readers:
            heads = reader is stream.readers[-1]
            norm = model.get_submodule(reader.norm)
            if not (heads and stream.tied):
                for path in reader.matrices:
                    module = model.get_submodule(path)
                    set_matrix(module, matrix(module).double() @ reading(model, stream, reader, how), None)
                    rest_at(model, path)
            weight = how.last if heads and how.last is not None else 1.0
            _narrow_norm(norm, how.basis.shape[1], weight - stream.offset)
        for path in stream.writers:
            module = model.get_submodule(path)
            bias = module.bias.data if isinstance(module.bias, nn.Parameter) else None
            moved = None if bias is None else (bias.double() @ into.to(bias.device)).to(bias.dtype)
            set_matrix(module, into.T.to(matrix(module).device) @ matrix(module).double(), moved)
            rest_at(model, path)
        _narrow_embedding(model, stream, embedded)
    for key, value in width_keys(stack, stream, how.basis.shape[1]).items():
        for config in stack_configs(model, stack):
            setattr(config, key, value)
    _follow_sizes(model, how.basis.shape)


def width_keys(stack: BoundStack, stream: ResidualStream, width: int) -> dict[str, int]:
    """The config keys for a stream of `width` channels: heads keep their size, which some configs derive otherwise."""
    attention = stack.blocks[0].attention
    keys = {stream.spec.width: width}
    if attention is not None and attention.spec.head_size_key is not None:
        keys[attention.spec.head_size_key] = attention.head_size
    return keys


def reading(model: nn.Module, stream: ResidualStream, reader: Reader, how: Slice) -> Tensor:
    """float64 (width, kept): what a matrix that reads the norm is multiplied by from the right. Before the cut."""
    weight = model.get_submodule(reader.norm).weight
    assert isinstance(weight, nn.Parameter)
    gain = weight.data.double() + stream.offset
    out = (gain / how.scale.to(gain.device))[:, None] * how.basis.to(gain.device)
    return out * (how.gain.get(reader.norm, 1.0) / how.shrinking)


def _narrow_norm(norm: nn.Module, width: int, weight: float) -> None:
    old = norm.weight
    assert isinstance(old, nn.Parameter)
    norm.weight = nn.Parameter(old.data.new_full((width,), weight), requires_grad=old.requires_grad)


def _narrow_embedding(model: PreTrainedModel, stream: ResidualStream, into: Tensor) -> None:
    """The embedding, and a head that shares its weight."""
    embedding = model.get_submodule(stream.embedding)
    old = embedding.weight
    assert isinstance(old, nn.Parameter)
    width, kept = into.shape
    if stream.spec.scaled is not None:
        into = into * (width / kept) ** 0.5
        scale = getattr(embedding, stream.spec.scaled)
        setattr(embedding, stream.spec.scaled, scale * (kept / width) ** 0.5)
        if hasattr(embedding, f"scalar_{stream.spec.scaled}"):
            setattr(embedding, f"scalar_{stream.spec.scaled}", kept**0.5)
    new = old.data.new_empty(len(old), kept)
    for start in range(0, len(old), 4096):  # a large vocabulary in float64 is large
        new[start : start + 4096] = (old.data[start : start + 4096].double() @ into.to(old.device)).to(old.dtype)
    holders = [module for module in model.modules() if getattr(module, "weight", None) is old]
    shared = nn.Parameter(new, requires_grad=old.requires_grad)
    for module in holders:
        module.weight = shared
        if isinstance(module, nn.Embedding):
            module.embedding_dim = kept
        else:
            module.in_features = kept  # type: ignore[assignment]


def _follow_sizes(model: PreTrainedModel, sizes: torch.Size) -> None:
    """Modules that remember the width remember what stock builds from the config."""
    built = dict(build_skeleton(model).named_modules())
    width, kept = sizes
    for path, module in model.named_modules():
        other = vars(built[path]) if path in built else {}
        for name, value in vars(module).items():
            if type(value) is int and value == width and other.get(name) == kept:
                setattr(module, name, kept)
