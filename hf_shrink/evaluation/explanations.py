"""Why a model decides as it does: what the parts of its input contribute, and where it looks.

Compression must not silently change either. Both are compared input by input, which takes a backward pass of each model
for attributions and a forward pass with the plain attention function for maps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_shrink.calibration.targets import Batch, Hidden, Kind, Logits
from hf_shrink.evaluation.observed import Columns
from hf_shrink.evaluation.ranks import spearman
from hf_shrink.evaluation.scored import forward

ATTRIBUTION, ATTENTION = ("attribution", "explained"), ("attention", "attended")
PARTS = 16  # an image is cut into so many rows and columns of parts, a sound into the square of it
_TEXT = "input_ids"

Decision = Callable[[Logits | Hidden], Tensor]


def attributions_agree(kind: Kind, batches: Iterable[Batch], model: Any, baseline: Any) -> Columns:
    """The rank correlation of both models' attributions of the dense model's decision, an entry an input.

    The decision is the dense model's first choice at the last position that counts (its log-probability), or the
    direction of its mean hidden state where there is no distribution. Attribution is gradient times input
    (arXiv:1605.01713), summed over the width of a token's embedding, or over a part of an image or sound.
    """
    found: Columns = {name: [] for name in ATTRIBUTION}
    for batch in _one_by_one(batches):
        with torch.no_grad():
            decision = _decision(forward(kind, batch, baseline))
        both = [_attribution(kind, batch, one, decision) for one in (model, baseline)]
        correlation = float(spearman(*both)) if both[0].shape == both[1].shape and both[0].size > 1 else float("nan")
        defined = bool(np.isfinite(correlation))
        found["attribution"].append(correlation if defined else 0.0)
        found["explained"].append(int(defined))
    return found


def attentions_agree(kind: Kind, batches: Iterable[Batch], model: Any, baseline: Any) -> Columns | None:
    """1 - total variation between both models' attention, summed over an input's positions; None: there are no maps."""
    found: Columns = {name: [] for name in ATTENTION}
    for batch in _one_by_one(batches):
        maps = [_attention(kind, batch, one) for one in (model, baseline)]
        own, dense = maps
        if own is None or dense is None or own.shape != dense.shape:
            return None
        agreement = 1 - (own - dense).abs().sum(-1) / 2
        real = batch.get("attention_mask", torch.ones(1, len(agreement)))[0].bool()
        kept = agreement[real] if len(real) == len(agreement) else agreement
        found["attention"].append(float(kept.double().sum()))
        found["attended"].append(len(kept))
    return found


def _one_by_one(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Single inputs: maps of all blocks are held at once."""
    for batch in batches:
        sizes = {len(value) for value in batch.values()}
        if len(sizes) > 1:  # not laid out one input a row: explained as a whole
            yield batch
            continue
        for row in range(sizes.pop()):
            yield {name: value[row : row + 1] for name, value in batch.items()}


def _decision(dense: Logits | Hidden) -> Decision:
    """What is explained, as a function of either model's outputs: a scalar."""
    if isinstance(dense, Logits):
        places = dense.positions[0].nonzero()
        place = int(places[-1]) if len(places) else 0
        if dense.logits.shape[-1] == 1:  # a score; the log of its softmax is always 0
            return lambda outputs: outputs.logits[0, place, 0].float()  # type: ignore[union-attr]
        choice = int(dense.logits[0, place].argmax())
        return lambda outputs: outputs.logits[0, place].float().log_softmax(-1)[choice]  # type: ignore[union-attr]
    direction = F.normalize(_mean_state(dense), dim=0)
    return lambda outputs: _mean_state(outputs) @ direction  # type: ignore[arg-type]


def _mean_state(hidden: Hidden) -> Tensor:
    return hidden.states[hidden.positions].float().mean(0)


def _attribution(kind: Kind, batch: Batch, model: Any, decision: Decision) -> np.ndarray[Any, Any]:
    """|gradient x input| of each part of the input, (parts,)."""
    with torch.enable_grad(), _leaf(batch, model) as leaf:
        outputs = forward(kind, {**batch, **leaf.inputs}, model)
        (gradient,) = torch.autograd.grad(decision(outputs), [leaf.tensor()])
    shares = (gradient * leaf.tensor().detach()).float()
    if leaf.inputs:
        parts = _cut(shares[0])
    else:
        real = batch.get("attention_mask", torch.ones_like(batch[_TEXT]))[0].bool()
        parts = shares[0].sum(-1)[real.to(shares.device)]
    return parts.abs().double().cpu().numpy()


def _cut(shares: Tensor) -> Tensor:
    """Sums over the parts of an image (channels, height, width) or a sound ((bins, frames) or samples)."""
    if shares.dim() >= 3:
        return F.adaptive_avg_pool2d(shares.flatten(0, -3).sum(0)[None], PARTS).flatten()
    steps = shares if shares.dim() == 1 else shares.sum(0)
    return F.adaptive_avg_pool1d(steps[None], PARTS**2).flatten()


class _Leaf:
    """What gradients are taken for: a floating-point input, or what the embeddings give for the token ids."""

    def __init__(self, inputs: Batch) -> None:
        self.inputs = inputs
        self.found: Tensor | None = next(iter(inputs.values()), None)

    def tensor(self) -> Tensor:
        assert self.found is not None, "the model did not look its input up in its embeddings"
        return self.found


@contextmanager
def _leaf(batch: Batch, model: Any) -> Iterator[_Leaf]:
    if _TEXT not in batch:
        name = next(name for name, value in batch.items() if value.is_floating_point())
        first = next(p for p in model.parameters() if p.is_floating_point())
        yield _Leaf({name: batch[name].to(first.device, first.dtype).requires_grad_()})
        return
    leaf, shape = _Leaf({}), batch[_TEXT].shape

    def looked_up(module: Any, arguments: Any, output: Tensor) -> Tensor | None:
        if leaf.found is not None or output.shape[:2] != shape:  # a decoder that shares the embeddings comes second
            return None
        leaf.found = output.detach().requires_grad_()
        return leaf.found

    reader = model.get_encoder() if model.config.is_encoder_decoder else model
    handle = reader.get_input_embeddings().register_forward_hook(looked_up)
    try:
        yield leaf
    finally:
        handle.remove()


def _attention(kind: Kind, batch: Batch, model: Any) -> Tensor | None:
    """Where a position of the (encoder's) input looks, (positions, positions), averaged over blocks and heads."""
    seen: Mapping[str, Any] = {}

    def keep(module: Any, arguments: Any, output: Any) -> None:
        nonlocal seen
        seen = output if isinstance(output, Mapping) else {}

    handle = model.register_forward_hook(keep)
    try:
        with torch.no_grad(), _plain_attention(model):
            forward(kind, batch, model, output_attentions=True)
    finally:
        handle.remove()
    maps = [one for name in ("encoder_attentions", "attentions") for one in seen.get(name) or () if one is not None]
    if not maps or len({one.shape[-2:] for one in maps}) > 1:
        return None
    total: Tensor = sum(one[0].float().mean(0) for one in maps) / len(maps)
    return total.cpu()


@contextmanager
def _plain_attention(model: Any) -> Iterator[None]:
    """Attention functions that keep their maps; the fast ones never have them whole."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    before = [(c, c._attn_implementation) for c in configs.values() if hasattr(c, "_attn_implementation")]
    try:
        for config, _ in before:
            config._attn_implementation = "eager"
        yield
    finally:
        for config, name in before:  # the outermost first: it hands its own on to those inside
            config._attn_implementation = name
