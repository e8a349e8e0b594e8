"""What is compared of a model's outputs: which logits, at which positions, against which labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_PRETRAINING_MAPPING_NAMES,
)

from hf_shrink.calibration.inputs import placeholder_ids
from hf_shrink.calibration.padding import token_mask
from hf_shrink.errors import CalibrationError

Batch = dict[str, torch.Tensor]
Kind = Literal["causal", "masked", "seq2seq", "several", "numbers", "other"]
WORDS: frozenset[Kind] = frozenset({"causal", "masked", "seq2seq"})  # predict tokens
_PROBLEMS: dict[str | None, Kind] = {"multi_label_classification": "several", "regression": "numbers"}
IGNORED = -100
MASKED_SHARE = 0.15
# Inputs with one row a sequence; batches of only these can be cut by rows.
_TEXT_INPUTS = {"input_ids", "attention_mask", "labels", "token_type_ids", "position_ids"}
BY_ROW = frozenset({*_TEXT_INPUTS, "decoder_input_ids", "decoder_attention_mask", "input_features"})


@dataclass(frozen=True)
class Logits:
    """Logits (batch, positions, classes), which positions count (bool), and labels (-100: none) of the same shape."""

    logits: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class Hidden:
    """Hidden states (batch, positions, features) of a model that puts out no distribution, and which ones count."""

    states: torch.Tensor
    positions: torch.Tensor


def kind_of(model: Any) -> Kind:
    """How the model is scored: next token, masked token, decoder's next token, or whatever its outputs are: several
    classes at once or numbers where its config says so (`problem_type`), else one class, states or embeddings."""
    name = type(model).__name__
    config = getattr(model, "config", None)
    head = _PROBLEMS.get(getattr(config, "problem_type", None), "other")
    has_vocabulary = getattr(model, "get_output_embeddings", lambda: None)() is not None
    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq" if has_vocabulary or getattr(model, "can_generate", lambda: False)() else head
    if name in _names(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        return "causal"
    if name in _names(MODEL_FOR_MASKED_LM_MAPPING_NAMES) and has_vocabulary:
        return "masked"
    if name in _names(MODEL_FOR_PRETRAINING_MAPPING_NAMES) and has_vocabulary and not _generates(model):
        return "masked"
    return "causal" if has_vocabulary and _generates(model) else head


def kind_by_labels(kind: Kind, batch: Batch, outputs: Any, *models: Any) -> Kind:
    """The kind as the first of the models' configs says it, or where none does, as transformers takes it by the labels
    when it computes a loss: numbers as labels of the logits' shape are for several classes."""
    logits, labels = outputs.get("logits"), batch.get("labels")
    if kind in WORDS or logits is None:
        return kind
    if logits.shape[-1] == 1:
        return "numbers"
    said = (getattr(getattr(model, "config", None), "problem_type", None) for model in models)
    problem = next((name for name in said if name is not None), None)
    if problem is not None:
        return _PROBLEMS.get(problem, "other")
    several = labels is not None and labels.is_floating_point() and labels.shape == logits.shape
    return "several" if several else "other"


def choices(logits: torch.Tensor) -> torch.Tensor:
    """Logits (...) of classes that are there or not as those of choices between the two, (..., 2)."""
    return torch.stack([logits, torch.zeros_like(logits)], dim=-1)


def mask_tokens(batch: Batch, mask_id: int, special: frozenset[int], generator: torch.Generator) -> Batch:
    """The batch with 15% of its real tokens replaced by the mask token, and `labels` at just those.

    Every row gets at least one masked token. A batch whose labels already pick out some of its tokens stays as it is.
    """
    ids = batch["input_ids"]
    real = batch.get("attention_mask", torch.ones_like(ids)).bool()
    given = batch.get("labels")
    if given is not None and bool(((given == IGNORED) & real).any()):
        return batch
    maskable = real & ~torch.isin(ids, torch.tensor(sorted(special), dtype=ids.dtype))
    order = torch.rand(ids.shape, generator=generator).masked_fill(~maskable, 2.0).argsort(dim=1).argsort(dim=1)
    wanted = (maskable.sum(1, keepdim=True) * MASKED_SHARE).ceil()
    chosen = maskable & (order < wanted)
    return {
        **batch,
        "input_ids": ids.masked_fill(chosen, mask_id),
        "labels": ids.masked_fill(~chosen, IGNORED),
    }


def without_placeholders(kind: Kind, batch: Batch, model: Any) -> Batch:
    """The batch with labels that leave out tokens which stand for parts of an image: no model writes them."""
    ids, config = batch.get("input_ids"), getattr(model, "config", None)
    if kind != "causal" or ids is None or not isinstance(config, PreTrainedConfig):
        return batch
    tokens = placeholder_ids(config)
    if not tokens:
        return batch
    left_out = torch.isin(ids, torch.tensor(tokens, dtype=ids.dtype, device=ids.device))
    return {**batch, "labels": batch.get("labels", ids).masked_fill(left_out, IGNORED)}


def model_inputs(kind: Kind, batch: Batch) -> Batch:
    """What is handed to `forward`: no labels except where the decoder's inputs are made from them."""
    if kind != "seq2seq":
        return {key: value for key, value in batch.items() if key != "labels"}
    if "labels" not in batch and "decoder_input_ids" not in batch:
        raise CalibrationError(
            "an encoder-decoder model is scored on its decoder, and the batches have neither labels nor "
            "decoder_input_ids; add the target sequence as labels"
        )
    if "decoder_input_ids" in batch:
        return {key: value for key, value in batch.items() if key != "labels"}
    return batch


def targets_of(kind: Kind, batch: Batch, outputs: Any, model: nn.Module | None = None) -> Logits | Hidden:
    """The scored part of one model's outputs. Raises CalibrationError when there is nothing to compare in them.

    `model`: whose outputs they are, which says what padded sounds become, see `fitted`.
    """
    if kind == "causal":
        return _next_token(outputs["logits"], batch["input_ids"], batch.get("attention_mask"), batch.get("labels"))
    if kind == "masked":
        ids = batch["input_ids"]
        real = batch.get("attention_mask", torch.ones_like(ids)).bool()
        labels = batch.get("labels", torch.full_like(ids, IGNORED)).masked_fill(~real, IGNORED)
        return Logits(outputs["logits"], real, labels)
    if kind == "seq2seq":
        if "decoder_input_ids" not in batch:  # forward shifted the labels itself: logits and labels are aligned
            real = batch["labels"] != IGNORED
            return Logits(outputs["logits"], real, batch["labels"])
        ids = batch["decoder_input_ids"]
        if "labels" in batch:
            return Logits(outputs["logits"], batch["labels"] != IGNORED, batch["labels"])
        return _next_token(outputs["logits"], ids, batch.get("decoder_attention_mask"), None)
    return _of_any_head(kind, batch, outputs, model)


def cut_by_rows(batch: Batch, rows: int) -> list[Batch]:
    """The batch in pieces of at most `rows` sequences, or whole where some input is not laid out one row a sequence."""
    sizes = {len(value) for value in batch.values()} if set(batch) <= BY_ROW else set()
    if len(sizes) != 1:
        return [batch]
    total = sizes.pop()
    return [{key: value[i : i + rows] for key, value in batch.items()} for i in range(0, total, rows)]


def _names(mapping: Mapping[str, Any]) -> set[str]:
    names: set[str] = set()
    for value in mapping.values():
        names.update(value if isinstance(value, tuple) else (value,))
    return names


def _generates(model: Any) -> bool:
    return bool(getattr(model, "can_generate", lambda: False)())


def _next_token(
    logits: torch.Tensor, ids: torch.Tensor, attention: torch.Tensor | None, labels: torch.Tensor | None
) -> Logits:
    """Position t is scored on token t + 1; padding on either side of that step is left out."""
    target = ids if labels is None else labels
    scored = target[:, 1:] != IGNORED
    if attention is not None:
        scored = scored & attention[:, 1:].bool() & attention[:, :-1].bool()
    # Image or audio features may stand before the text in the outputs; the text's logits are the last ones.
    logits = logits[:, -ids.shape[1] :]
    return Logits(logits[:, :-1], scored, target[:, 1:].masked_fill(~scored, IGNORED))


def _of_any_head(kind: Kind, batch: Batch, outputs: Any, model: nn.Module | None) -> Logits | Hidden:
    """Class logits of a task head, or else hidden states or embeddings. Each of several classes is a position with a
    choice of its own, and so is each number, with one logit."""
    if outputs.get("logits") is not None:
        logits = outputs["logits"]
        logits = logits[:, None] if logits.dim() == 2 else logits
        if logits.dim() != 3:
            raise CalibrationError(f"logits of shape {tuple(logits.shape)} are not class scores that can be compared")
        positions = _positions(logits, batch, model)
        if kind in ("several", "numbers"):
            positions, logits = positions.repeat_interleave(logits.shape[-1], dim=1), logits.flatten(1)
            logits = choices(logits) if kind == "several" else logits[..., None]
        return Logits(logits, positions, _no_labels(logits))
    if outputs.get("start_logits") is not None:  # question answering: two distributions over the positions
        logits = torch.stack([outputs["start_logits"], outputs["end_logits"]], dim=1)
        return Logits(logits, _positions(logits), _no_labels(logits))
    if outputs.get("last_hidden_state") is not None:
        states = outputs["last_hidden_state"]
        states = states.flatten(2).transpose(1, 2) if states.dim() == 4 else states  # convolutional: (B, C, H, W)
        return Hidden(states, _positions(states, batch, model))
    embeddings = [outputs[key] for key in ("image_embeds", "text_embeds") if outputs.get(key) is not None]
    if embeddings and all(e.dim() == 2 for e in embeddings):
        # Images and texts may differ in number, so they are laid out as the positions of one row.
        states = torch.cat(embeddings)[None]
        return Hidden(states, _positions(states))
    raise CalibrationError(
        f"nothing to compare in the model's outputs ({', '.join(outputs)}); logits, a last hidden state or embeddings "
        "are needed"
    )


def _positions(values: torch.Tensor, batch: Batch | None = None, model: nn.Module | None = None) -> torch.Tensor:
    """Those of values (batch, positions, ...) that are no padding; all of them without a batch."""
    real = token_mask(batch or {}, values.shape[:2], model)
    return torch.ones(values.shape[:2], dtype=torch.bool, device=values.device) if real is None else real


def _no_labels(logits: torch.Tensor) -> torch.Tensor:
    return torch.full(logits.shape[:2], IGNORED, dtype=torch.long, device=logits.device)
