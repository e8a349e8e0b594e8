"""Fold scales and rotations into the weights of a model. Its function stays the same, to rounding of the weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hf_shrink.architectures.feeds import Feed, NormSource
from hf_shrink.architectures.linears import matrix
from hf_shrink.architectures.residual import ResidualStream
from hf_shrink.residence import rest_at

ROWS = 4096  # of a matrix that are rotated at a time, in float64


def fold_scales(model: nn.Module, feed: Feed, scale: Tensor, stored: torch.dtype) -> Tensor:
    """Divide the feed's source by `scale` (units,), multiply its readers' columns by it, in place.

    Args:
        scale: positive.
        stored: dtype in which the norm's weight will be kept. It is rounded to it at once, and the readers are scaled
            by what that makes of the scale, so that rounding the norm (which in some models keeps its weight minus 1)
            costs nothing.

    Returns:
        The scales that were used, (units,). 1 where the norm's weight is 0, before or after.
    """
    with torch.no_grad():
        source = model.get_submodule(feed.source.path)
        if isinstance(feed.source, NormSource):
            used = _divide_norm(source, feed.source.offset, scale, stored)
        else:
            used = scale
            weight, rows = matrix(source), feed.source.rows.to(scale.device)
            weight[rows] = weight[rows] / used.to(weight.dtype)[:, None]
            if isinstance(source.bias, nn.Parameter):
                source.bias.data[rows] = source.bias.data[rows] / used.to(source.bias.dtype)
        for path in feed.readers:
            weight = matrix(model.get_submodule(path))
            weight *= used[feed.unit.to(used.device)].to(weight.dtype)
    return used


def _divide_norm(norm: nn.Module, offset: float, scale: Tensor, stored: torch.dtype) -> Tensor:
    parameter = norm.weight
    assert isinstance(parameter, nn.Parameter)
    old = parameter.data.double() + offset
    kept = (old / scale.double() - offset).to(stored).to(parameter.dtype)
    used = old / (kept.double() + offset)
    sound = (used > 0) & torch.isfinite(used)
    parameter.data = torch.where(sound, kept, parameter.data)
    used = torch.where(sound, used, 1.0)
    bias = getattr(norm, "bias", None)
    if isinstance(bias, nn.Parameter):
        bias.data = (bias.data.double() / used).to(bias.dtype)
    return used


def fold_rotation(model: nn.Module, stream: ResidualStream, rotation: Tensor) -> None:
    """Turn the residual stream's row vectors x into x Q, in place.

    Norms' weights go into the matrices that read them first, since only a norm without weight keeps a rotation; then
    the embedding becomes E Q, readers W diag(g) Q and writers Q^T W. In half precision the weights are rounded anew.

    Args:
        rotation: float64 (width, width), orthogonal.
    """
    with torch.no_grad():
        for reader in stream.readers:
            norm = model.get_submodule(reader.norm)
            assert isinstance(norm.weight, nn.Parameter)
            gain = norm.weight.data.double() + stream.offset
            for path in reader.matrices:
                _multiply(matrix(model.get_submodule(path)), gain[:, None] * rotation.to(gain.device))
                rest_at(model, path)
            norm.weight.data = torch.full_like(norm.weight.data, 1 - stream.offset)
        for path in stream.writers:
            module = model.get_submodule(path)
            _multiply(matrix(module).t(), rotation)
            if isinstance(module.bias, nn.Parameter):
                _multiply(module.bias.data[None], rotation)
            rest_at(model, path)
        embedding = model.get_submodule(stream.embedding).weight
        assert isinstance(embedding, nn.Parameter)
        _multiply(embedding.data, rotation)


def fold_shift(model: nn.Module, norm: str, readers: Sequence[str], carrier: str | None, constants: Tensor) -> Tensor:
    """Take constants off a norm's outputs and put what its readers, and the residual, lack into their biases, in place.

    Args:
        carrier: path of the matrix that adds to the norm's output; None where that goes to the readers only.
        constants: (channels,).

    Returns:
        What the rounded bias of the norm lost, float64: the constants that were used.
    """
    with torch.no_grad():
        bias = model.get_submodule(norm).bias
        assert isinstance(bias, nn.Parameter)
        before = bias.data.double()
        bias.data = (before - constants.to(before)).to(bias.dtype)
        used = before - bias.data.double()
        for path in readers:
            module = model.get_submodule(path)
            own = module.bias
            assert isinstance(own, nn.Parameter)
            own.data = (own.data.double() + matrix(module).double() @ used.to(own.device)).to(own.dtype)
        if carrier is not None:
            own = model.get_submodule(carrier).bias
            assert isinstance(own, nn.Parameter)
            own.data = (own.data.double() + used.to(own.device)).to(own.dtype)
    return used


def _multiply(weight: Tensor, factor: Tensor) -> None:
    """weight @ factor in place: `weight` is a view of what a module holds."""
    factor = factor.to(weight.device)
    for start in range(0, len(weight), ROWS):
        rows = weight[start : start + ROWS]
        rows.copy_(rows.double() @ factor)
