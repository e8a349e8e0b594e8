"""Images with text for models that read both in one sequence: each row through the model's own processor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import ProcessorMixin

from hf_shrink.calibration.inputs import OWN_BATCHES, ModelInputs
from hf_shrink.calibration.media import media_column
from hf_shrink.calibration.overlap import OverlapFilter
from hf_shrink.calibration.recipes import Rows
from hf_shrink.calibration.text import text_columns
from hf_shrink.errors import CalibrationError
from hf_shrink.progress import ProgressCallback, quiet


def reads_pairs(inputs: ModelInputs) -> bool:
    """Whether the model reads images among its text."""
    return inputs.media is None and inputs.generates and "pixel_values" in inputs.accepted


def pair_column(rows: Rows, example: Mapping[str, Any], inputs: ModelInputs, wanted: tuple[str, ...]) -> str | None:
    """The column of images for such a model; None where there is none, or it is not wanted.

    `example`: the first row.
    """
    column = media_column(rows, example, "image") if reads_pairs(inputs) else None
    return column if not wanted or column in wanted else None


@dataclass(frozen=True)
class PairReader:
    """Makes one batch of every row: a user's turn of its image and its text.

    Attributes:
        processing: the model's processor, with an image processor and a tokenizer.
        samples: how many rows.
        length: tokens of a row's text at most; those of its image come on top.
        overlap: rows whose text it knows are left out.
    """

    processing: object
    inputs: ModelInputs
    samples: int
    length: int
    overlap: OverlapFilter | None = None

    def read(
        self,
        rows: Iterable[Mapping[str, Any]],
        image: str,
        wanted: tuple[str, ...],
        name: str,
        progress: ProgressCallback = quiet,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Any], list[str]]:
        """Model inputs, details and notes of the data set `name`.

        Args:
            image: the column of images (PIL images, as data sets decode them).
            wanted: the columns to use; empty: the usual ones. Without a text column the image stands alone.

        Raises:
            CalibrationError: no processor, a text that is not a string, or no rows.
        """
        processor: Any = self.processing
        if not isinstance(processor, ProcessorMixin) or getattr(processor, "image_processor", None) is None:
            raise CalibrationError(
                f"the data has images (column {image!r}), which takes the model's processor; pass it as tokenizer=, or "
                "use data without images"
            )
        batches: list[dict[str, Tensor]] = []
        left_out = 0
        for row in rows:
            if len(batches) == self.samples:
                break
            text = _text(row, image, wanted)
            if self.overlap is not None and self.overlap.overlaps(text):
                left_out += 1
                continue
            picture = row[image].convert("RGB") if hasattr(row[image], "convert") else row[image]
            prompt = _prompt(processor, _cut(processor, text, self.length))
            made = processor(images=[picture], text=[prompt], return_tensors="pt")
            batches.append({n: v for n, v in made.items() if isinstance(v, Tensor) and n in self.inputs.accepted})
            progress("reading images", len(batches), self.samples)
        if not batches:
            raise CalibrationError(f"{name} has no rows that can be used")
        few = f"{name} has {len(batches)} images instead of {self.samples}"
        notes = [few] if len(batches) < self.samples else []
        return batches, {"source": name, "dropped_overlap": left_out}, notes


def _text(row: Mapping[str, Any], image: str, wanted: tuple[str, ...]) -> str:
    """The row's text; of several captions of one image the first."""
    values = {name: _first(value) for name, value in row.items() if name != image}
    asked = tuple(name for name in wanted if name != image)
    if not asked and (wanted or not any(isinstance(value, str | list) for value in values.values())):
        return ""
    columns = text_columns(list(values), asked, values)
    if not all(isinstance(values[name], str) for name in columns):
        raise CalibrationError(f"column {columns[0]!r} beside the images is not text; name another, or {OWN_BATCHES}")
    return "\n".join(values[name] for name in columns)


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value and isinstance(value[0], str) else value


def _cut(processor: Any, text: str, length: int) -> str:
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    return str(processor.tokenizer.decode(ids[:length])) if len(ids) > length else text


def _prompt(processor: Any, text: str) -> str:
    """The text behind its image, in the form that the model was trained on where the processor knows one."""
    if getattr(processor, "chat_template", None):
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
        return str(processor.apply_chat_template([turn], tokenize=False))
    mark = getattr(processor, "image_token", None)
    if not isinstance(mark, str):
        raise CalibrationError(
            f"{type(processor).__name__} has neither a chat template nor an image_token, so where the image goes is "
            f"unknown; {OWN_BATCHES}"
        )
    return f"{mark}\n{text}"
