"""Two models with different vocabularies on the same text, each in tokens of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from hf_shrink.calibration.inputs import longest_text
from hf_shrink.calibration.targets import IGNORED, Batch, Hidden, Kind, Logits
from hf_shrink.errors import CalibrationError
from hf_shrink.evaluation.divergence import Totals, is_score
from hf_shrink.evaluation.scored import Prepared, forward, length_of

TEXT = {"input_ids": "attention_mask", "decoder_input_ids": "decoder_attention_mask"}
_HALF = "\ufffd"  # where a window begins or ends within a character
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
        CalibrationError: a tokenizer is missing or does not say where a token stands, or a batch holds more than text
            and labels of overlapping windows.
    """
    model, baseline = models
    own, dense = tokenizers
    if own is None or dense is None:
        raise CalibrationError("models with different vocabularies are compared by the text: pass both tokenizers")
    limit = min((n for m in models if (n := longest_text(m)) is not None), default=None)
    context = 0
    kind, both = prepared.kind, (prepared, Prepared.of(prepared.kind, baseline, dense))
    for row in _rows(batch, kind):
        same = (_same_window if "labels" in row else _same_text)(row, own, dense, limit)
        pair = [next(p.of_all([b])) for p, b in zip(both, same, strict=True)]
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


def _rows(batch: Batch, kind: Kind) -> Iterator[Batch]:
    """The rows of a batch of text, without padding; with labels where not all of it is scored.

    Raises CalibrationError for other batches.
    """
    known = {*TEXT, *TEXT.values(), "token_type_ids", *(["labels"] if kind == "causal" else [])}
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
        if "labels" in batch:
            real = batch.get("attention_mask", torch.ones_like(batch["labels"]))[row].bool()
            labels = batch["labels"][row][real]
            found |= {} if torch.equal(labels, found["input_ids"]) else {"labels": labels}
        yield found


def _same_text(
    row: Batch, own: PreTrainedTokenizerBase, dense: PreTrainedTokenizerBase, limit: int | None
) -> tuple[Batch, Batch]:
    """A row's text in the tokens of both, cut where either would be too long."""
    found: tuple[Batch, Batch] = {}, {}
    for name, ids in row.items():
        text = _text(ids, dense).strip(_HALF)
        while True:
            both = [t(text, add_special_tokens=False, verbose=False)["input_ids"] for t in (own, dense)]
            longest = max(map(len, both))
            if limit is None or longest <= limit:
                break
            text = text[: len(text) * limit // (longest + 1)]
        for batch, tokens in zip(found, both, strict=True):
            batch[name] = torch.tensor([tokens])
    return found


def _same_window(
    row: Batch, own: PreTrainedTokenizerBase, dense: PreTrainedTokenizerBase, limit: int | None
) -> tuple[Batch, Batch]:
    """A window that is scored from one of its tokens on, in the tokens of both, with labels from that character on.

    Raises CalibrationError for other labels, for tokenizers that do not say where a token stands, and for what is too
    long for a model: cut at its end it would not be scored, which the windows beside it leave to it.
    """
    ids, labels = row["input_ids"], row["labels"]
    first = int((labels != IGNORED).int().argmax())
    if not torch.equal(labels[first:], ids[first:]):
        raise CalibrationError(
            "labels that are not those of overlapping windows cannot be given to models with different vocabularies; "
            "evaluate each model alone, or on text"
        )
    whole = _text(ids, dense)
    text = whole.lstrip(_HALF)
    begin = len(_text(ids[:first], dense).rstrip(_HALF)) - (len(whole) - len(text))
    text = text.rstrip(_HALF)
    found: tuple[Batch, Batch] = {}, {}
    for batch, tokenizer in zip(found, (own, dense), strict=True):
        if not tokenizer.is_fast:
            raise CalibrationError(
                f"{type(tokenizer).__name__} does not say where a token stands, which windows that overlap need; leave "
                "the stride out, or use a fast tokenizer"
            )
        made = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
        tokens = torch.tensor([made["input_ids"]])
        if limit is not None and tokens.shape[1] > limit:
            raise CalibrationError(
                f"a window of {len(ids)} tokens has {tokens.shape[1]} in the other vocabulary, and the model reads "
                f"{limit}; give a smaller length"
            )
        scored = torch.tensor([[start >= begin for start, _ in made["offset_mapping"]]])
        batch.update(input_ids=tokens, labels=tokens.masked_fill(~scored, IGNORED))
    return found


def _text(ids: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
