"""What a spec asks of a model's data, once everything that decides it is known: each source becomes batches here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_shrink.calibration.batches import CalibrationData, finish
from hf_shrink.calibration.documents import documents_of
from hf_shrink.calibration.generate import Writer, decoder_length
from hf_shrink.calibration.inputs import (
    MediaProcessor,
    ModelInputs,
    inputs_of,
    longest_text,
    media_processor_of,
    need_text,
    tokenizer_of,
    vocabulary_size,
)
from hf_shrink.calibration.media import media_column, media_noise, media_rows, noise_note
from hf_shrink.calibration.overlap import OverlapFilter
from hf_shrink.calibration.pairs import PairReader, pair_column, reads_pairs
from hf_shrink.calibration.recipes import (
    DataRecipe,
    Purpose,
    Rows,
    from_parquet,
    in_order,
    iterate,
    load_recipe,
    load_rows,
    peeked,
    positions,
)
from hf_shrink.calibration.sampling import stream_seed
from hf_shrink.calibration.text import (
    Document,
    Framing,
    framing_of,
    missing,
    pack,
    read_lines,
    read_text,
    text_columns,
)
from hf_shrink.errors import CalibrationError
from hf_shrink.progress import ProgressCallback
from hf_shrink.recipe import CalibrationSpec, EvaluationSpec


@dataclass(frozen=True)
class Request:
    """Everything that decides the batches, apart from where the data comes from."""

    spec: CalibrationSpec | EvaluationSpec
    model: PreTrainedModel
    inputs: ModelInputs
    tokenizer: PreTrainedTokenizerBase | None
    processor: MediaProcessor | None
    processing: object | None
    framing: Framing
    length: int
    seed: int
    overlap: OverlapFilter | None
    purpose: Purpose
    progress: ProgressCallback
    notes: tuple[str, ...]

    @classmethod
    def of(
        cls,
        spec: CalibrationSpec | EvaluationSpec,
        model: nn.Module,
        tokenizer: object | None,
        seed: int,
        exclude: Sequence[str] | None,
        purpose: Purpose,
        progress: ProgressCallback,
    ) -> Request:
        inputs = inputs_of(model)
        assert isinstance(model, PreTrainedModel)
        text_tokenizer = tokenizer_of(tokenizer)
        decoder_only = inputs.generates and not inputs.seq2seq
        framing = framing_of(text_tokenizer, decoder_only=decoder_only) if text_tokenizer is not None else Framing()
        limit = longest_text(model) if inputs.text else None
        length = min(spec.length, limit or spec.length)
        short = f"the model takes at most {length} tokens, so samples have {length} instead of {spec.length}"
        return cls(
            spec=spec,
            model=model,
            inputs=inputs,
            tokenizer=text_tokenizer,
            processor=media_processor_of(tokenizer),
            processing=tokenizer,
            framing=framing,
            length=length,
            seed=seed,
            overlap=OverlapFilter(exclude) if exclude else None,
            purpose=purpose,
            progress=progress,
            notes=(short,) if length < spec.length else (),
        )

    def file(self, path: Path) -> CalibrationData:
        if not path.is_file():
            raise CalibrationError(f"there is no file {path}")
        if path.suffix == ".txt":
            return self.text([read_text(path)], path.name)
        if path.suffix == ".jsonl":
            lines = read_lines(path)
            names = list(dict.fromkeys(name for line in lines for name in line))
            columns = text_columns(names, example=lines[0])
            return self._documents(
                (lines[i] for i in positions(len(lines), self.purpose, self.seed)), columns, path.name
            )
        return self.rows(in_order(from_parquet(path), self.purpose, self.seed), path.name, ())

    def recipe(self, recipe: DataRecipe) -> CalibrationData:
        # Before anything is downloaded.
        if recipe.kind in ("text", "chat"):
            need_text(self.inputs, self.model, recipe.name)
        elif self.inputs.medium != recipe.kind and not (recipe.kind == "image" and reads_pairs(self.inputs)):
            raise CalibrationError(
                f"data {recipe.name!r} is {recipe.kind}, which {type(self.model).__name__} does not read"
            )
        rows = load_rows(recipe, self.purpose, self.seed)
        details = {"dataset": recipe.dataset, "split": str(rows.split) if rows.split else recipe.split}
        if recipe.join is None:
            return self.rows(rows, recipe.name, recipe.columns, details, iterate(rows, recipe))
        columns = text_columns(list(rows.column_names or ()), recipe.columns)
        text = recipe.join.join(str(row[columns[0]]) for row in iterate(rows, recipe))
        return self.text([text], recipe.name, details)

    def rows(
        self,
        rows: Rows,
        name: str,
        columns: tuple[str, ...],
        details: Mapping[str, Any] | None = None,
        iterator: Iterable[Mapping[str, Any]] | None = None,
    ) -> CalibrationData:
        """A data set of raw rows: images and sounds when the model reads them and the rows hold them, else text."""
        example, iterator = peeked(rows if iterator is None else iterator)
        column = media_column(rows, example, self.inputs.medium, columns) if self.inputs.media else None
        if column is not None:
            values = media_rows(
                iterator, column, self.model, self.inputs, self.processor, self.spec.samples, self.progress
            )
            return self._with_media(values, name, dict(details or {}))
        if (image := pair_column(rows, example, self.inputs, columns)) is not None:
            reader = PairReader(self.processing, self.inputs, self.spec.samples, self.length, self.overlap)
            batches, known, notes = reader.read(iterator, image, columns, name, self.progress)
            what, known = f"{len(batches)} images with text of {name}", {**known, **(details or {})}
            notes = [*self.notes, *notes]
            return finish(batches, what, known, notes, self.spec, self.seed, self.purpose, self.model.dtype)
        need_text(self.inputs, self.model, name)
        names = list(rows.column_names or example)
        return self._documents(iterator, text_columns(names, columns, example), name, details)

    def text(
        self,
        documents: Iterable[Document],
        name: str,
        details: Mapping[str, Any] | None = None,
        refused: Sequence[str] = (),
    ) -> CalibrationData:
        """Consecutive windows of the documents, in the order given; `refused`: see `documents_of`."""
        need_text(self.inputs, self.model, name)
        if self.tokenizer is None:
            raise CalibrationError(f"text ({name}) needs a tokenizer; pass tokenizer=, or use --calibration self")
        samples = self.spec.samples
        windows = pack(
            documents,
            self.tokenizer,
            samples=samples,
            length=self.length,
            framing=self.framing,
            vocabulary=vocabulary_size(self.model),
            overlap=self.overlap,
            progress=self.progress,
        )
        notes = missing(windows, name, samples, self.length, refused)
        known = {"source": name, "dropped_overlap": windows.dropped, **(details or {})}
        return self._with_text(torch.tensor(windows.rows), f"tokens of {name}", known, notes)

    def written(self, recipe: DataRecipe) -> CalibrationData:
        """`self`: the model's own text, or noise for its eyes and ears."""
        samples = self.spec.samples
        if not self.inputs.text:
            return self._with_media(self._noise(), None, {})
        writer = self._writer(recipe)
        text = writer.text(samples, self.length)
        details = {"source": "self", **text.details}
        notes = details.pop("notes", [])
        by = "random tokens" if notes else f"tokens written by the model (temperature {recipe.temperature:g})"
        return self._with_text(text.rows, by, details, notes)

    def _documents(
        self,
        rows: Iterable[Mapping[str, Any]],
        columns: tuple[str, ...],
        name: str,
        details: Mapping[str, Any] | None = None,
    ) -> CalibrationData:
        if self.tokenizer is None:
            return self.text((), name)
        refused: list[str] = []
        documents = documents_of(rows, columns, self.tokenizer, refused)
        return self.text(documents, name, {"columns": list(columns), **(details or {})}, refused)

    def _with_text(self, rows: Tensor, what: str, details: dict[str, Any], notes: Sequence[str]) -> CalibrationData:
        """Text, with what else the model reads: its decoder's text, or noise for its second tower."""
        values = {"input_ids": rows}
        notes = list(notes)
        if self.inputs.seq2seq:
            values |= self._decoder({"input_ids": rows})
        if self.inputs.media:
            values[self.inputs.media] = self._noise(len(rows))
            notes.append(noise_note(self.inputs.medium))
        return self._batches(values, f"{len(rows)} x {rows.shape[1]} {what}", details, notes)

    def _with_media(self, values: Tensor, name: str | None, details: dict[str, Any]) -> CalibrationData:
        """Images or sounds (`name` None: noise), with the text that the model reads besides."""
        media, medium = self.inputs.media, "images" if self.inputs.medium == "image" else "clips of sound"
        assert media is not None
        notes = [] if name is not None else [noise_note(self.inputs.medium)]
        if len(values) < self.spec.samples:
            notes.append(f"{name} has {len(values)} {medium} instead of {self.spec.samples}")
        inputs = {media: values}
        if self.inputs.text:
            text = self._writer(None).text(len(values), self.length)
            inputs["input_ids"] = text.rows
            notes += text.details.get("notes", [])
        if self.inputs.seq2seq:
            inputs |= self._decoder({media: values.to(self.model.dtype)})
        what = f"{len(values)} {medium}" + (f" of {name}" if name is not None else " of noise with a natural spectrum")
        return self._batches(inputs, what, {"source": name or "self", **details}, notes)

    def _decoder(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self.inputs.generates:
            # A bare encoder-decoder: the same text on both sides, as its training by reconstruction had it.
            ids = inputs.get("input_ids")
            if ids is None:
                raise CalibrationError(
                    f"{type(self.model).__name__} has no head to write its decoder's text with; load the model with one"
                )
            return {"decoder_input_ids": ids}
        length = decoder_length(self.model, self.length)
        return {"decoder_input_ids": self._writer(None).answers(inputs, length)}

    def _writer(self, recipe: DataRecipe | None) -> Writer:
        recipe = recipe or load_recipe("self")
        return Writer(
            self.model,
            self.inputs,
            self.tokenizer,
            self.framing,
            seed=stream_seed(self.seed, self.purpose),
            temperature=recipe.temperature,
            chat_share=recipe.chat_share,
            progress=self.progress,
        )

    def _noise(self, samples: int | None = None) -> Tensor:
        count = self.spec.samples if samples is None else samples
        return media_noise(self.model, self.inputs, self.processor, count, stream_seed(self.seed, self.purpose))

    def _batches(
        self, values: dict[str, Tensor], what: str, details: Mapping[str, Any], notes: Sequence[str]
    ) -> CalibrationData:
        if "input_ids" in values and "attention_mask" in self.inputs.accepted:
            values = {**values, "attention_mask": torch.ones_like(values["input_ids"])}
        rows = len(next(iter(values.values())))
        size = self.spec.batch_size
        batches = [{n: v[i : i + size].contiguous() for n, v in values.items()} for i in range(0, rows, size)]
        details = {**details, "length": self.length if "input_ids" in values else None}
        notes = [*self.notes, *notes]
        return finish(batches, what, details, notes, self.spec, self.seed, self.purpose, dtype=self.model.dtype)
