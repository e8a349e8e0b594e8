"""Shift the outputs of norms, before the walk: what rounds its inputs then has narrower ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_shrink.architectures.bound import BoundStack
from hf_shrink.architectures.shiftable import find_shiftable
from hf_shrink.calibration.capture import model_inputs
from hf_shrink.calibration.collect import LastInputSeen
from hf_shrink.calibration.padding import token_mask, without_padding
from hf_shrink.errors import CalibrationError
from hf_shrink.plan import Scheme
from hf_shrink.sharding import ranks
from hf_shrink.transforms import Shifting, Transform
from hf_shrink.transforms.fold import fold_shift

TOKENS = 4096  # of each norm's outputs that are looked at, or as many as BYTES allow
BYTES = 2**29  # of all norms' outputs
FEWEST = 256


def shift(
    model: nn.Module,
    stacks: Sequence[BoundStack],
    transforms: Sequence[Transform],
    schemes: Mapping[str, Scheme],
    batches: Sequence[Mapping[str, Any]],
) -> list[str]:
    """Take constants off the channels that quantized matrices with rounded inputs read; returns notes.

    Args:
        schemes: by present path.
        batches: model inputs.

    Raises:
        CalibrationError: a norm gave nothing, or numbers that are not finite.
    """
    notes = []
    for transform in (t for t in transforms if isinstance(t, Shifting)):
        count = 0
        for stack in stacks:
            shiftables = find_shiftable(model, stack)
            wanted = [s for s in shiftables.found if any(_rounds(schemes.get(path)) for path in s.readers)]
            outputs = _outputs(model, [s.norm for s in wanted], batches)
            for shiftable in wanted:
                rounding = [scheme for path in shiftable.readers if _rounds(scheme := schemes.get(path))]
                symmetric = all(scheme is not None and scheme.activation_symmetric for scheme in rounding)
                constants = ranks().on_first(partial(transform.constants, outputs[shiftable.norm], symmetric))
                fold_shift(model, shiftable.norm, shiftable.readers, shiftable.carrier, constants)
            count += len(wanted)
            for (roles, reason), blocks in shiftables.refused.items():
                notes.append(f"inputs of {roles} were not shifted in {blocks} blocks: {reason}")
        if count:
            notes.insert(0, f"constants were taken off the outputs of {count} norms and put into biases")
    return notes


def _rounds(scheme: Scheme | None) -> bool:
    return scheme is not None and scheme.activation_bits < 16


def _outputs(model: nn.Module, norms: Sequence[str], batches: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Some of what each norm puts out, float32 (tokens, channels)."""
    found: dict[str, list[Tensor]] = {path: [] for path in norms}
    if not norms:
        return {}

    widths = sum(model.get_parameter(f"{path}.bias").numel() for path in norms)
    most = min(TOKENS, max(FEWEST, BYTES // (4 * widths)))

    def keep(path: str, left: set[str], mask: Tensor | None, _: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        missing = most - sum(map(len, found[path]))
        found[path].append(without_padding(out, mask).detach().flatten(0, -2)[:missing].float())
        left.discard(path)
        if not left:  # what comes behind, above all logits, is not needed
            raise LastInputSeen

    for batch in batches:
        leading, left = next(value for value in batch.values() if isinstance(value, Tensor)).shape[:2], set(norms)
        with ExitStack() as stack, torch.no_grad(), suppress(LastInputSeen):
            for path in norms:
                hook = partial(keep, path, left, token_mask(batch, leading))
                stack.callback(model.get_submodule(path).register_forward_hook(hook).remove)
            model(**model_inputs(model, batch))
        if all(sum(map(len, rows)) >= most for rows in found.values()):
            break
    joined = {path: torch.cat(rows) for path, rows in found.items() if rows}
    for path in norms:
        if path not in joined or not torch.isfinite(joined[path]).all():
            raise CalibrationError(f"{path} gave nothing, or numbers that are not finite; check the calibration data")
    return joined
