"""Batches that the user made: checked, put on the CPU, cut to the batch size."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from hf_shrink.architectures.reads import accepted_names
from hf_shrink.calibration.inputs import MEDIA, placeholder_ids, setting
from hf_shrink.calibration.targets import IGNORED, kind_of
from hf_shrink.errors import CalibrationError

MEDIA_INPUTS = MEDIA.keys() - {"input_ids"}
_LAYOUTS = {
    "pixel_values": ("batch", "channels", "height", "width"),
    "input_features": ("batch", "features", "frames"),
    "input_values": ("batch", "samples"),
}
_OWN_LAYOUT = ("_grid_thw", "spatial_shapes", "pixel_attention_mask", "position_ids")  # come with patches in a list


def given_batches(
    batches: Iterable[Mapping[str, Any]], model: nn.Module, samples: int, batch_size: int
) -> tuple[list[dict[str, Tensor]], list[str]]:
    """The first `samples` rows of an iterable of model-input dicts, at most `batch_size` rows a batch, and notes.

    A row without a batch dimension becomes a batch of one; only there numbers (a class) are inputs. A batch that cannot
    be cut between its rows (not one image in each) stays whole, whatever its size. Keys that the model's forward does
    not take are left out.
    Raises CalibrationError when an element is not a mapping of tensors, and when nothing is left.
    """
    accepted = accepted_names(model)
    unread: set[str] = set()
    unfit: set[str] = set()
    kept: list[dict[str, Tensor]] = []
    rows = 0
    cut = False
    for number, batch in enumerate(batches):
        if rows >= samples:
            cut = True
            break
        if not isinstance(batch, Mapping):
            raise CalibrationError(
                f"element {number} of the calibration data is a {type(batch).__name__}, not a dict of model inputs"
            )
        read = {name: value for name, value in batch.items() if accepted is None or name in accepted}
        wanted = {name: tensor for name, value in read.items() if (tensor := _tensor(value)) is not None}
        if not wanted:
            raise CalibrationError(
                f"element {number} of the calibration data has nothing that {type(model).__name__} reads: it has "
                f"{', '.join(map(str, batch)) or 'no keys'}"
            )
        _check_ids(wanted, model)
        wanted = _without_numbers(_batched(wanted, model), batch)
        unread |= set(batch) - set(read)
        unfit |= set(read) - set(wanted)
        wanted = _with_decoder_ids(_with_token_types(wanted, accepted, model), model)
        count = _rows(wanted, model)
        if count is None:
            # Not row by row (patches of several images in one list): cannot be cut, so it is taken as it is.
            kept.append(wanted)
            rows += len(wanted.get("input_ids", (0,)))
            continue
        cut |= count > samples - rows
        count = min(count, samples - rows)
        for start in range(0, count, batch_size):
            stop = min(start + batch_size, count)
            kept.append({n: t[start:stop] if t.dim() > 0 else t for n, t in wanted.items()})
        rows += count
    if not kept:
        raise CalibrationError("the calibration data is empty; pass at least one batch of model inputs")
    notes = [f"only the first {samples} rows were used (calibration.samples)"] if cut else []
    for names, why in ((unread, "not inputs of the model"), (unfit, "not tensors with a row for every sample")):
        if names:
            notes.append(f"{why}, left out: {', '.join(sorted(map(str, names)))}")
    return kept, notes


def stacked(rows: Iterable[Mapping[str, Any]], model: nn.Module, batch_size: int) -> Iterator[dict[str, Any]]:
    """Rows of a data set that hold model inputs, as batches. Labels of different lengths are filled up with -100.

    Raises CalibrationError where another column that the model reads has rows of different shapes.
    """
    accepted, iterator = accepted_names(model), iter(rows)
    while group := list(islice(iterator, batch_size)):
        columns = {name: [row[name] for row in group] for name in group[0]}
        yield {n: _stack(n, v) if accepted is None or n in accepted else v for n, v in columns.items()}


def _stack(name: str, values: list[Any]) -> Any:
    """The values of one column as one tensor; as they are where some hold no numbers."""
    tensors = [tensor for value in values if (tensor := _tensor(value)) is not None]
    if len(tensors) < len(values):
        return values
    if name == "labels" and all(t.dim() == 1 and not t.is_floating_point() for t in tensors):
        return pad_sequence(tensors, batch_first=True, padding_value=IGNORED)
    if len({t.shape for t in tensors}) > 1:
        raise CalibrationError(
            f"column {name!r} has rows of different shapes, which do not fit one batch; pad them first"
        )
    return torch.stack(tensors)


def _tensor(value: Any) -> Tensor | None:
    """A CPU tensor of a tensor, an array, nested lists of numbers or a number; None for anything else."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if _is_number(value):
        return torch.as_tensor(value)
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.as_tensor(value)
    if isinstance(value, list | tuple):
        try:
            return torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            return None
    return None


def _is_number(value: Any) -> bool:
    """Flags are none: they say how to run a model, not on what."""
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def _without_numbers(tensors: dict[str, Tensor], batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Numbers of a batch of one row with its dimension; those of several rows, of which they say nothing, left out."""
    if all(len(tensor) == 1 for tensor in tensors.values() if tensor.dim() > 0):
        return {name: tensor if tensor.dim() > 0 else tensor.unsqueeze(0) for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in tensors.items() if not _is_number(batch[name])}


def _batched(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """With a batch dimension. Patches of images in one list, and the grids that say whose they are, have none."""
    ids = tensors.get("input_ids")
    if ids is None and isinstance(model, PreTrainedModel):
        single = _is_one_row(tensors, model)
        return {name: tensor.unsqueeze(0) for name, tensor in tensors.items()} if single else tensors
    if ids is None or ids.dim() != 1:
        return tensors
    patches = any(name.endswith("_grid_thw") for name in tensors)
    return {
        name: tensor if patches and (name.endswith("_grid_thw") or name.startswith("pixel_")) else tensor.unsqueeze(0)
        for name, tensor in tensors.items()
    }


def _is_one_row(tensors: dict[str, Tensor], model: PreTrainedModel) -> bool:
    """Whether these are one image or sound without a batch dimension. Inputs of more dimensions are left to the model.

    Raises CalibrationError when a dimension is missing elsewhere.
    """
    name = next((name for name in _LAYOUTS if name in tensors), None)
    if name is None or any(other.endswith(_OWN_LAYOUT) for other in tensors):
        return False
    shape, layout = tuple(tensors[name].shape), _LAYOUTS[name]
    channels = setting(model.config, "num_channels") if name == "pixel_values" and len(shape) == 3 else None
    if len(shape) < len(layout) - 1 or (isinstance(channels, int) and shape[0] != channels):
        raise CalibrationError(
            f"{name} has the shape {shape} where {type(model).__name__} reads ({', '.join(layout)}); give it so, or "
            "without the first of these"
        )
    return len(shape) == len(layout) - 1


def _with_token_types(
    tensors: dict[str, Tensor], accepted: Collection[str] | None, model: nn.Module
) -> dict[str, Tensor]:
    """With `mm_token_type_ids` (0 text, 1 image, 2 video), which older processors do not make, where they are read."""
    name, ids = "mm_token_type_ids", tensors.get("input_ids")
    if accepted is None or name not in accepted or name in tensors or ids is None:
        return tensors
    types = torch.zeros_like(ids)
    for kind, key in enumerate(("image_token_id", "video_token_id"), start=1):
        token = setting(model.config, key)
        if isinstance(token, int):
            types[ids == token] = kind
    return {**tensors, name: types}


def _with_decoder_ids(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """With what an encoder-decoder's own forward makes of labels for its decoder, which runs without labels here."""
    labels = tensors.get("labels")
    if labels is None or labels.dim() != 2 or tensors.keys() & {"decoder_input_ids", "decoder_inputs_embeds"}:
        return tensors
    if not isinstance(model, PreTrainedModel) or kind_of(model) != "seq2seq":
        return tensors
    try:
        made = {**tensors, "decoder_input_ids": _shifted(labels, model)}
    except (TypeError, ValueError) as error:
        raise CalibrationError(
            f"the decoder's inputs cannot be made from the labels ({error}); set decoder_start_token_id and "
            "pad_token_id in the model's config, or add decoder_input_ids to the batches"
        ) from error
    # What follows the last label is padding. In front of it the model reads everything, as in its training.
    real = (labels != IGNORED).flip(1).cumsum(1).flip(1) > 0
    return made if bool(real.all()) else {**made, "decoder_attention_mask": real.long()}


def _shifted(labels: Tensor, model: PreTrainedModel) -> Tensor:
    own: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if own is not None:
        made: Tensor = own(labels)
        return made
    start, padding = model.config.decoder_start_token_id, model.config.pad_token_id
    ids = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
    return ids.masked_fill(ids == IGNORED, padding)


def _rows(tensors: dict[str, Tensor], model: nn.Module) -> int | None:
    """How many rows the batch has; None when it cannot be cut between them."""
    counts = {len(t) for t in tensors.values() if t.dim() > 0}
    if 0 in counts:
        raise CalibrationError("a batch of the calibration data has no rows")
    positions, ids = tensors.get("position_ids"), tensors.get("input_ids")
    if len(counts) != 1 or (positions is not None and positions.dim() == 3):  # three axes come first there
        return None
    if ids is not None and len(ids) > 1 and isinstance(model, PreTrainedModel) and tensors.keys() & MEDIA_INPUTS:
        # As many images as rows, but are they one in each?
        marked = torch.isin(ids, torch.tensor(placeholder_ids(model.config), dtype=ids.dtype)).sum(dim=1)
        if len(set(marked.tolist())) > 1:
            return None
    return counts.pop()


def _check_ids(tensors: dict[str, Tensor], model: nn.Module) -> None:
    size = setting(model.config, "vocab_size") if isinstance(model, PreTrainedModel) else None
    ids = tensors.get("input_ids")
    if ids is not None and ids.numel() and isinstance(size, int) and int(ids.max()) >= size:
        raise CalibrationError(
            f"the calibration data has token {int(ids.max())}, but the model's vocabulary has {size} entries; "
            "was it made with another model's tokenizer?"
        )
