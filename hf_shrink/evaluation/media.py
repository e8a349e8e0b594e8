"""Images and sounds of rows, from files too, as a model's inputs."""

from __future__ import annotations

import wave
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_shrink.calibration.inputs import MediaProcessor
from hf_shrink.errors import CalibrationError

_RATE = 16_000


def read_images(values: Sequence[Any], processor: MediaProcessor, mode: str) -> Mapping[str, Any]:
    """What the processor makes of images: arrays as they are; PIL images, files, and {bytes, path} as data sets store
    them in the given mode (`image_mode`).

    Raises CalibrationError for what cannot be read.
    """
    return processor([_image(value, mode) for value in values], return_tensors="pt")


def read_clips(values: Sequence[Any], extractor: MediaProcessor) -> Mapping[str, Any]:
    """What the extractor makes of sounds: decoded audio, {array, sampling_rate}, or paths of .wav files.

    Raises CalibrationError for what cannot be read, and for a sound that the extractor would cut.
    """
    rate = int(getattr(extractor, "sampling_rate", _RATE))
    clips = [clip(value, rate) for value in values]
    longest = getattr(extractor, "chunk_length", None)
    for one in clips:
        if longest is not None and len(one) > longest * rate:
            raise CalibrationError(
                f"a sound is {len(one) / rate:.1f} seconds long, but the model reads {longest} at once; cut it, or "
                "leave its row out"
            )
    return extractor(clips, sampling_rate=rate, return_tensors="pt", **({} if longest else {"padding": True}))


def _image(value: Any, mode: str) -> Any:
    if isinstance(value, str | Path):
        from PIL import Image, ImageOps, UnidentifiedImageError

        try:
            with Image.open(value) as opened:
                return ImageOps.exif_transpose(opened).convert(mode)  # upright, as data sets decode them
        except (OSError, UnidentifiedImageError) as error:
            raise CalibrationError(f"cannot read the image {value}: {error}") from error
    if isinstance(value, Mapping):
        import datasets

        try:
            value = datasets.Image().decode_example({key: value.get(key) for key in ("bytes", "path")})
        except (OSError, ValueError) as error:
            raise CalibrationError(f"cannot read an image of the data: {error}") from error
    return value.convert(mode) if hasattr(value, "convert") else np.asarray(value)


def clip(value: Any, rate: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """A sound as one channel of float32 at `rate` samples a second. Raises CalibrationError."""
    if isinstance(value, str | Path):
        samples, own = _wave(Path(value))
    elif hasattr(value, "get_all_samples"):
        decoded = value.get_all_samples()
        samples, own = decoded.data.numpy(), int(decoded.sample_rate)
    elif isinstance(value, Mapping) and value.get("array") is not None:
        samples, own = np.asarray(value["array"], dtype=np.float32), int(value.get("sampling_rate") or rate)
    else:
        raise CalibrationError(
            f"a sound must be decoded audio, {{array, sampling_rate}} or the path of a .wav file, not a "
            f"{type(value).__name__}"
        )
    if own != rate:
        raise CalibrationError(
            f"the sounds have {own} samples a second, the model reads {rate}; resample them, for example with "
            f"dataset.cast_column(column, datasets.Audio({rate}))"
        )
    mono: np.ndarray[Any, np.dtype[np.float32]] = samples.mean(axis=0) if samples.ndim == 2 else samples
    if not mono.size:
        raise CalibrationError("a sound of the data is empty")
    return mono.astype(np.float32)


def _wave(path: Path) -> tuple[np.ndarray[Any, np.dtype[np.float32]], int]:
    """(channels, samples) from -1 to 1, and the rate, of a .wav file of whole numbers."""
    try:
        with wave.open(str(path), "rb") as opened:
            width, channels, rate = opened.getsampwidth(), opened.getnchannels(), opened.getframerate()
            octets = opened.readframes(opened.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise CalibrationError(f"cannot read the sound {path}: {error}; give .wav files of 16-bit samples") from error
    if width != 2:
        raise CalibrationError(f"{path} has samples of {8 * width} bits; give .wav files of 16-bit samples")
    samples = np.frombuffer(octets, dtype="<i2").reshape(-1, channels).T
    return samples.astype(np.float32) / np.float32(2**15), rate
