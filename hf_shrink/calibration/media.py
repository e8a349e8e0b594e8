"""Images and sounds as model inputs: through the model's own processor, or noise where there is no data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hf_shrink.calibration.inputs import OWN_BATCHES, MediaProcessor, Medium, ModelInputs, setting
from hf_shrink.calibration.noise import as_pixels, noise_clip, noise_images, pink_noise
from hf_shrink.calibration.recipes import Rows
from hf_shrink.errors import CalibrationError
from hf_shrink.progress import ProgressCallback, quiet
from hf_shrink.registry import did_you_mean

CLIP_SECONDS = 5
_SAMPLING_RATE = 16_000
_COLUMNS: dict[Medium, tuple[str, ...]] = {
    "image": ("image", "img", "images"),
    "audio": ("audio", "speech"),
    "text": (),
}
_MODES = {1: "L", 3: "RGB"}  # of PIL images, by channels
_PROCESSED_AT_ONCE = 16


def noise_note(medium: Medium) -> str:
    """What the user should know about noise in place of data."""
    remedy = "mini-imagenet" if medium == "image" else "librispeech"
    what = f"the {medium} input is noise with a natural spectrum, a stand-in"
    return f"{what}; real data (such as {remedy}) calibrates better"


def media_noise(
    model: PreTrainedModel, inputs: ModelInputs, processor: MediaProcessor | None, samples: int, seed: int
) -> Tensor:
    """`samples` noise images or clips as the model's `inputs.media`, float32.

    Raw noise goes through the processor; without one it is made in the shape that the config says, normalised.
    """
    generator = torch.Generator().manual_seed(seed)
    if inputs.medium == "image":
        return _noise_pictures(model, inputs, processor, samples, generator)
    if processor is not None:
        seconds = getattr(processor, "chunk_length", None) or CLIP_SECONDS
        rate = getattr(processor, "sampling_rate", _SAMPLING_RATE)
        clips = (noise_clip(int(seconds * rate), generator).numpy() for _ in range(samples))
        return _processed(clips, processor, inputs)
    bins = setting(model.config, "num_mel_bins")
    if bins is None:
        return torch.stack([pink_noise((CLIP_SECONDS * _SAMPLING_RATE,), 1, generator) for _ in range(samples)])
    # Log-mel features: (bins, frames) where the encoder halves the frames, (frames, bins) in spectrogram transformers.
    positions, frames = setting(model.config, "max_source_positions"), setting(model.config, "max_length")
    if inputs.main == "input_features" and positions is not None:
        return pink_noise((samples, bins, 2 * positions), 2, generator)
    if isinstance(frames, int):
        return pink_noise((samples, frames, bins), 2, generator)
    raise CalibrationError(
        f"the shape of {inputs.media} is not in the model's config; pass its feature extractor, or {OWN_BATCHES}"
    )


def _noise_pictures(
    model: PreTrainedModel,
    inputs: ModelInputs,
    processor: MediaProcessor | None,
    samples: int,
    generator: torch.Generator,
) -> Tensor:
    size = setting(model.config, "image_size")
    size = 224 if size is None and processor is not None else size
    if size is None:
        raise CalibrationError(f"the config has no image_size; pass the model's image processor, or {OWN_BATCHES}")
    height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    channels = setting(model.config, "num_channels") or 3
    frames = setting(model.config, "num_frames")
    if frames is not None:
        stills = noise_images(samples * frames, channels, height, width, generator)
        return stills.reshape(samples, frames, channels, height, width)
    images = noise_images(samples, channels, height, width, generator)
    if processor is None or channels != 3:
        return images
    return _processed((image.numpy() for image in as_pixels(images)), processor, inputs)


def image_mode(config: PreTrainedConfig) -> str:
    """The mode of PIL images that a model with this config reads. Raises CalibrationError where there is none."""
    channels = setting(config, "num_channels") or 3
    if channels not in _MODES:
        raise CalibrationError(
            f"the model reads {channels} channels, and images are read with one or three; pass model-input dicts (what "
            "you would call the model with) as the data"
        )
    return _MODES[channels]


def media_rows(
    rows: Iterable[Mapping[str, Any]],
    column: str,
    model: PreTrainedModel,
    inputs: ModelInputs,
    processor: MediaProcessor | None,
    samples: int,
    progress: ProgressCallback = quiet,
) -> Tensor:
    """Up to `samples` images or clips of the rows as the model's `inputs.media`, float32, through its processor.

    Raises CalibrationError without a processor, without rows, for rows without the column, and for sounds that cannot
    be decoded.
    """
    if processor is None:
        what = "an image processor" if inputs.medium == "image" else "a feature extractor"
        raise CalibrationError(
            f"the data holds {inputs.medium} files, which takes {what}; pass it (or the processor) as tokenizer="
        )
    cells = (_cell(row, column, inputs) for row in islice(rows, samples))
    values = _counted(cells, samples, progress, f"reading {inputs.medium}s")
    if inputs.medium == "image":
        mode = image_mode(model.config)
        return _processed(
            (image.convert(mode) if hasattr(image, "convert") else image for image in values), processor, inputs
        )
    return _processed((_clip(value, processor) for value in values), processor, inputs)


def media_column(rows: Rows, example: Mapping[str, Any], medium: Medium, wanted: tuple[str, ...] = ()) -> str | None:
    """The column of images or sounds: the one wanted, else by its type, else by its name; None when there is none.

    `example`: the first row, which says what the columns are where the data set does not know (a mapped stream).
    """
    names = list(rows.column_names or example)
    for name in wanted[:1]:
        if names and name not in names:
            raise CalibrationError(f"the data has no column {name!r}; {did_you_mean(name, names)}")
        return name
    import datasets

    kind = datasets.Image if medium == "image" else datasets.Audio
    if rows.features:
        typed = [name for name, feature in rows.features.items() if isinstance(feature, kind)]
    else:
        typed = [name for name, value in example.items() if _decoded(value, medium)]
    return next((name for name in (*typed, *_COLUMNS[medium]) if name in names), None)


def _cell(row: Mapping[str, Any], column: str, inputs: ModelInputs) -> Any:
    if column not in row:
        raise CalibrationError(
            f"the data set's rows have {', '.join(row) or 'nothing'} and no column {column!r}, which it names; let its "
            f"transform leave that in place, or make {inputs.media} of it"
        )
    return row[column]


def _decoded(value: Any, medium: Medium) -> bool:
    """Whether a value of a row is an image or a sound, as the datasets library decodes them."""
    if medium == "image":
        return hasattr(value, "convert")
    return hasattr(value, "get_all_samples") or (isinstance(value, Mapping) and "array" in value)


def _counted(values: Iterable[Any], total: int, progress: ProgressCallback, what: str) -> Iterator[Any]:
    for done, value in enumerate(values, start=1):
        yield value
        progress(what, done, total)


def _processed(raw: Iterable[Any], processor: MediaProcessor, inputs: ModelInputs) -> Tensor:
    name = inputs.media
    assert name is not None
    keywords = (
        {} if inputs.medium == "image" else {"sampling_rate": getattr(processor, "sampling_rate", _SAMPLING_RATE)}
    )
    values, pieces = iter(raw), []
    while group := list(islice(values, _PROCESSED_AT_ONCE)):
        output = processor(group, return_tensors="pt", **keywords)
        if name not in output:
            raise CalibrationError(
                f"the processor makes {', '.join(output)}, but the model reads {name}; is it another model's?"
            )
        pieces.append(output[name].float())
    if not pieces:
        raise CalibrationError("the data set has no rows")
    if len({piece.shape[1:] for piece in pieces}) > 1:
        raise CalibrationError(
            f"the processor gives {inputs.medium}s of different sizes, which do not fit one batch; {OWN_BATCHES}"
        )
    return torch.cat(pieces)


def _clip(value: Any, processor: MediaProcessor) -> np.ndarray[Any, Any]:
    """A decoded sound as one channel at the processor's rate, repeated or cut to a fixed time."""
    if hasattr(value, "get_all_samples"):
        decoded = value.get_all_samples()
        samples, rate = decoded.data.numpy(), decoded.sample_rate
    elif isinstance(value, Mapping) and "array" in value:
        samples, rate = np.asarray(value["array"], dtype=np.float32), value.get("sampling_rate")
    else:
        raise CalibrationError(f"a sound must be decoded audio or {{array, sampling_rate}}, not {type(value).__name__}")
    wanted = getattr(processor, "sampling_rate", _SAMPLING_RATE)
    if rate is not None and rate != wanted:
        raise CalibrationError(
            f"the sounds have {rate} samples a second, the model reads {wanted}; resample them, for example "
            f"with dataset.cast_column(column, datasets.Audio({wanted}))"
        )
    mono = samples.mean(axis=0) if samples.ndim == 2 else samples
    if mono.size == 0:
        raise CalibrationError("a sound of the data is empty")
    # Extractors with a chunk length pad by themselves; the others would make batches of ragged clips.
    return mono if getattr(processor, "chunk_length", None) else np.resize(mono, CLIP_SECONDS * wanted)
