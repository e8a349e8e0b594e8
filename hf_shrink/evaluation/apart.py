"""Two models with different vocabularies on the same text, each in tokens of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from hf_shrink.calibration.inputs import longest_text
from hf_shrink.calibration.targets import Batch, Hidden, Kind, Logits
from hf_shrink.errors import CalibrationError
from hf_shrink.evaluation.divergence import Totals, is_score
from hf_shrink.evaluation.scored import Prepared, forward, length_of

TEXT = {"input_ids": "attention_mask", "decoder_input_ids": "decoder_attention_mask"}
Tokenizers = tuple[PreTrainedTokenizerBase | None, PreTrainedTokenizerBase | None]


def add_apart(
    totals: Totals,
    prepared: Prepared,
    batch: Batch,
    models: tuple[Any, Any],
    tokenizers: Tokenizers,
    scored: Callable[[Batch, Logits], None],
) -> int:
    """Add both models' likelihoods of the same texts to `totals`, a row at a time; returns the longest row's length.

    The counts are those of the first model's tokens. The baseline's likelihoods are summed over the whole text, so
    that their difference is per token of the first model; where only some tokens are scored (masked ones, whose number
    differs) the baseline's mean stands for as many.

    Args:
        batch: in the baseline's tokens.
        models, tokenizers: the model and its baseline.
        scored: called with each row and what the model puts out for it.

    Raises:
        CalibrationError: a tokenizer is missing, or a batch holds more than text.
    """
    model, baseline = models
    own, dense = tokenizers
    if own is None or dense is None:
        raise CalibrationError("models with different vocabularies are compared by the text: pass both tokenizers")
    limit = min((n for m in models if (n := longest_text(m)) is not None), default=None)
    context = 0
    kind, both = prepared.kind, (prepared, Prepared.of(prepared.kind, baseline, dense))
    for row in _rows(batch):
        pair = [next(p.of_all([b])) for p, b in zip(both, _same_text(row, own, dense, limit), strict=True)]
        context = max(context, length_of(pair[0]))
        outputs = forward(kind, pair[0], model)
        _add(totals, kind, outputs, forward(kind, pair[1], baseline))
        if isinstance(outputs, Logits):
            scored(pair[0], outputs)
    return context


def _add(totals: Totals, kind: Kind, own: Logits | Hidden, dense: Logits | Hidden) -> None:
    if isinstance(own, Hidden) or isinstance(dense, Hidden):
        if isinstance(own, Hidden) and isinstance(dense, Hidden) and own.states.shape == dense.states.shape:
            totals.add_hidden(own, dense)
        return
    if is_score(own) and is_score(dense):
        totals.add_scores(own, dense)
        return
    beside = Totals()
    totals.add_logits(own, None)
    beside.add_logits(dense, None)
    share = totals.predicted[-1] / beside.predicted[0] if kind == "masked" and beside.predicted[0] else 1.0
    totals.baseline_nll += [beside.nll[0] * share]


def _rows(batch: Batch) -> Iterator[Batch]:
    """The rows of a batch of text, without padding. Raises CalibrationError for other batches."""
    known = {*TEXT, *TEXT.values(), "token_type_ids"}
    if not set(batch) <= known:
        raise CalibrationError(
            f"batches with {', '.join(sorted(set(batch) - known))} cannot be given to models with different "
            "vocabularies; evaluate each model alone, or on text"
        )
    for row in range(len(batch["input_ids"])):
        found = {}
        for name, mask in TEXT.items():
            if name in batch:
                real = batch.get(mask, torch.ones_like(batch[name]))[row].bool()
                found[name] = batch[name][row][real]
        yield found


def _same_text(
    row: Batch, own: PreTrainedTokenizerBase, dense: PreTrainedTokenizerBase, limit: int | None
) -> tuple[Batch, Batch]:
    """A row's text in the tokens of both, cut where either would be too long."""
    found: tuple[Batch, Batch] = {}, {}
    for name, ids in row.items():
        # A window may begin and end within a character.
        text = str(dense.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)).strip("\ufffd")
        while True:
            both = [t(text, add_special_tokens=False, verbose=False)["input_ids"] for t in (own, dense)]
            longest = max(map(len, both))
            if limit is None or longest <= limit:
                break
            text = text[: len(text) * limit // (longest + 1)]
        for batch, tokens in zip(found, both, strict=True):
            batch[name] = torch.tensor([tokens])
    return found
