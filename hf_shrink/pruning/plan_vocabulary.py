"""Vocabulary pruning, planned: which tokens the texts use, and which others must stay so that every text has some."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_shrink.calibration.chats import refused_note
from hf_shrink.calibration.documents import documents, tokens_of
from hf_shrink.calibration.inputs import tokenizer_of
from hf_shrink.calibration.text import Document
from hf_shrink.errors import RecipeError
from hf_shrink.plan import VocabularyPlan
from hf_shrink.progress import ProgressCallback, quiet
from hf_shrink.pruning.base import VocabularyMethod
from hf_shrink.ranges import to_ranges
from hf_shrink.surgery.tokenizer import (
    AWKWARD,
    Pieces,
    check_ids,
    check_pieces,
    check_round_trips,
    fast_json,
    pieces_of,
    rewrite,
    token_table,
)
from hf_shrink.surgery.tokenizer.rewrite import added_tokens
from hf_shrink.surgery.vocabulary import special_ids, vocabulary_rows

# Inputs of a model that hold tokens. Batches with others beside them are not rewritten, so that their tokens all stay.
ID_INPUTS = frozenset({"input_ids", "decoder_input_ids"})
BESIDE = frozenset({"attention_mask", "decoder_attention_mask", "token_type_ids"})


class PlannedVocabulary(NamedTuple):
    """What is kept, and what the user should know."""

    plan: VocabularyPlan
    notes: list[str]


class _Read(NamedTuple):
    """Documents of one text with their tokens, whether there were more, and what the user should know of others."""

    encoded: list[tuple[Document, list[int]]]
    cut: bool
    notes: list[str]


def plan_vocabulary(
    model: PreTrainedModel,
    processing: object,
    method: VocabularyMethod,
    batches: Sequence[Mapping[str, Any]],
    *,
    seed: int = 0,
    progress: ProgressCallback = quiet,
) -> PlannedVocabulary:
    """Decide which tokens stay. Model and tokenizer are left as they were.

    What stays: the tokens that the method keeps; every added and special token and every id that a config names; the
    pieces that every text can be spelled in; and the pieces that kept ones are merged from.

    Args:
        processing: the model's tokenizer, or a processor with one.
        batches: the calibration data, in the tokens of now.
        seed: of the order of data sets that are read in part.

    Raises:
        RecipeError: the tokenizer cannot be made smaller safely, or nothing would go.
        ArchitectureError: the model's vocabulary cannot be cut.
        CalibrationError: a text is missing or is not text.
    """
    rows, tokenizer = vocabulary_rows(model), tokenizer_of(processing)
    text = fast_json(tokenizer)
    assert tokenizer is not None
    table, pieces, added = token_table(text), pieces_of(text), added_tokens(text)
    size = max(rows, *table.values()) + 1
    texts = [_read(source, tokenizer, method.tokens, seed, progress) for source in method.texts]
    encoded = [pair for found in texts for pair in found.encoded]
    given = [row for batch in batches for row in rows_of_ids(batch)]
    counts = _counts([ids for _, ids in encoded] if method.texts else given, size)
    if not int(counts.sum()):
        raise RecipeError("there is no text to count tokens in; give prune.texts, or calibration data")
    kept: set[int] = set(method.keeps(counts).nonzero()[:, 0].tolist())
    kept |= {index for batch in batches if not can_respell(batch) for row in rows_of_ids(batch) for index in row}
    kept |= special_ids(model) | set(added.values()) | {table[piece] for piece in pieces.basic(added)}
    kept = {index for index in kept if index < size}
    close(kept, pieces)
    fill(kept, pieces, rows, method.multiple_of)
    left = sum(index < rows for index in kept)
    if left == rows:
        raise RecipeError(
            f"the texts use all of the {rows:,} tokens, or need them; the vocabulary step would do nothing"
        )
    _verify(text, kept, encoded, given)
    plan = VocabularyPlan(rows, to_ranges(sorted(kept)), fingerprint(text))
    used = int((counts > 0).sum())
    where = ", ".join(method.texts) if method.texts else "the calibration data"
    notes = [
        f"vocabulary: {left:,} of {rows:,} tokens stay; {int(counts.sum()):,} tokens of {where} use {used:,} of them",
        "texts with other words are cut into more and shorter tokens than before; perplexity is per token of the new "
        "tokenizer",
    ]
    if any(found.cut for found in texts):
        notes.append(f"only the first {method.tokens:,} tokens of a text were read; prune.tokens says how many")
    notes += [note for found in texts for note in found.notes]
    return PlannedVocabulary(plan, notes)


def fingerprint(text: str) -> str:
    """SHA-256 of a tokenizer's tokens and ids, from its JSON."""
    table = json.dumps(sorted(token_table(text).items(), key=lambda item: (item[1], item[0])))
    return hashlib.sha256(table.encode()).hexdigest()


def rows_of_ids(batch: Mapping[str, Any]) -> Iterable[list[int]]:
    """The rows of tokens in a batch; labels of -100 are none."""
    for name in (*sorted(ID_INPUTS), "labels"):
        ids = batch.get(name)
        if isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point():
            yield from ([index for index in row if index >= 0] for row in ids.tolist())


def can_respell(batch: Mapping[str, Any]) -> bool:
    """Whether a token of the batch may become several: nothing else must stand at the same places."""
    return set(batch) <= ID_INPUTS | BESIDE


def _read(
    source: str, tokenizer: PreTrainedTokenizerBase, most: int | None, seed: int, progress: ProgressCallback
) -> _Read:
    """Documents until there are about `most` tokens."""
    encoded: list[tuple[Document, list[int]]] = []
    refused: list[str] = []
    done, cut = 0, False
    for document in documents(source, tokenizer, seed, refused):
        if most is not None and done >= most:
            cut = True
            break
        if document:
            encoded.append((document, tokens_of(document, tokenizer)))
            done += len(encoded[-1][1])
            progress(f"reading {source}", done, max(most or done, done))
    return _Read(encoded, cut, refused_note(refused, source))


def _counts(rows: Iterable[Sequence[int]], size: int) -> Tensor:
    counts = torch.zeros(size, dtype=torch.long)
    for row in rows:
        counts += torch.bincount(torch.tensor(row, dtype=torch.long), minlength=size)
    return counts


def close(kept: set[int], pieces: Pieces) -> None:
    """Add the pieces that kept ones are made of."""
    for piece, index in pieces.ids.items():
        if index in kept:
            kept |= {pieces.ids[part] for part in pieces.needs(piece)}


def fill(kept: set[int], pieces: Pieces, rows: int, multiple: int) -> None:
    """Add tokens, those with the lowest ids first, until the model's rows are a multiple."""
    missing = -sum(index < rows for index in kept) % multiple
    for index, piece in sorted((index, piece) for piece, index in pieces.ids.items() if index not in kept):
        if not missing:
            return
        wanted = {pieces.ids[part] for part in pieces.needs(piece)} | {index}
        new = wanted - kept
        if index < rows and len(new) <= missing:
            kept |= new
            missing -= len(new)


def _verify(
    text: str, kept: set[int], encoded: Sequence[tuple[Document, list[int]]], given: Sequence[Sequence[int]]
) -> None:
    """Raises RecipeError unless the smaller tokenizer does to all texts what the larger one did."""
    smaller = rewrite(text, kept)
    texts = [document for document, _ in encoded if isinstance(document, str)]
    rows = [*given, *(ids for document, ids in encoded if not isinstance(document, str))]
    check_round_trips(text, smaller.text, [*AWKWARD, *texts])
    check_pieces(text, smaller.text, smaller.new_ids, texts)
    check_ids(text, smaller.text, smaller.new_ids, [row for row in rows if all(i in smaller.new_ids for i in row)])
