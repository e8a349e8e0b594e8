"""Carry out a vocabulary plan: tokenizer, model and the batches that are calibrated with, in one go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_shrink.calibration.capture import model_inputs
from hf_shrink.calibration.inputs import inputs_of, tokenizer_of
from hf_shrink.errors import ArchitectureError, CalibrationError, RecipeError
from hf_shrink.pipeline.recipes import vocabulary_method
from hf_shrink.plan import VocabularyPlan
from hf_shrink.progress import ProgressCallback
from hf_shrink.pruning.plan_vocabulary import PlannedVocabulary, fingerprint, plan_vocabulary
from hf_shrink.recipe import PruneStep
from hf_shrink.surgery.tokenizer import AWKWARD, check_round_trips, fast_json, install, pieces_of, rewrite, token_table
from hf_shrink.surgery.vocabulary import cut_vocabulary, named_ids, vocabulary_rows

Batch = Mapping[str, Any]
COMPANIONS = {
    "input_ids": ("attention_mask", "token_type_ids"),
    "decoder_input_ids": ("decoder_attention_mask",),
    "labels": (),
}
SAMPLE = 48  # tokens that old and new model are compared on


def plan_tokens(
    model: nn.Module,
    step: PruneStep | None,
    processing: Any,
    batches: Sequence[Batch],
    seed: int,
    progress: ProgressCallback,
) -> PlannedVocabulary | None:
    """Which tokens a step keeps; None without a step. Arguments and errors as in `plan_vocabulary`."""
    if step is None:
        return None
    assert isinstance(model, PreTrainedModel)
    return plan_vocabulary(model, processing, vocabulary_method(step), batches, seed=seed, progress=progress)


def apply_vocabulary(
    model: PreTrainedModel, plan: VocabularyPlan, processing: Any, batches: Sequence[Batch]
) -> list[dict[str, Any]]:
    """Cut the vocabulary of a model and its tokenizer, both in place.

    Args:
        processing: the tokenizer that the plan was made with, or a processor with it.
        batches: in the tokens of before.

    Returns:
        The batches in the tokens of now; a token that is gone is spelled in others, and a row keeps its length.

    Raises:
        RecipeError: it is not the tokenizer of the plan, or it cannot be made smaller safely; nothing is changed then.
        ArchitectureError: the model's outputs for kept tokens changed.
        CalibrationError: a batch has a token that neither the plan keeps nor the tokenizer knows.
    """
    tokenizer = tokenizer_of(processing)
    text = fast_json(tokenizer)
    assert tokenizer is not None
    if fingerprint(text) != plan.tokenizer or vocabulary_rows(model) != plan.rows:
        raise RecipeError("the plan's vocabulary is not that of this tokenizer and model; make the plan anew")
    smaller = rewrite(text, plan.ids)
    check_round_trips(text, smaller.text, AWKWARD)
    spelling = Spelling.of(text, smaller.text, smaller.new_ids)
    renumbered = [spelling.batch(batch) for batch in batches]
    rows = [old for old in plan.ids if old < plan.rows]
    sample = _sample(model, renumbered, len(rows))
    before = None if sample is None else _outputs(model, spelling.undone(sample))
    install(tokenizer, smaller.text)
    for key, value in list(named_ids(processing)) if processing is not tokenizer else ():
        setattr(processing, key, smaller.new_ids.get(value, value) if isinstance(value, int) else value)
    cut_vocabulary(model, plan.ids)
    if sample is not None and before is not None:
        if before.shape[-1] == plan.rows:
            before = before[..., rows]
        _compare(before, _outputs(model, sample))
    return renumbered


@dataclass(frozen=True)
class Spelling:
    """From tokens of before to tokens of now.

    Attributes:
        new_ids: of the tokens that are kept.
        spelled: of tokens that are gone, the tokens that stand for their text now.
    """

    new_ids: Mapping[int, int]
    spelled: Mapping[int, tuple[int, ...]]

    @classmethod
    def of(cls, before: str, after: str, new_ids: Mapping[int, int]) -> Spelling:
        """Of two tokenizers' JSON."""
        pieces = pieces_of(after)
        spelled = {}
        for token, index in token_table(before).items():
            if index not in new_ids:
                found = pieces.spell(token)
                if all(piece in pieces.ids for piece in found):
                    spelled[index] = tuple(pieces.ids[piece] for piece in found)
        return cls(new_ids, spelled)

    def batch(self, batch: Batch) -> dict[str, Any]:
        """A batch in the tokens of now. Rows keep their length: what no longer fits at the end is left out."""
        found = dict(batch)
        for name, beside in COMPANIONS.items():
            ids = batch.get(name)
            if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dim() != 2:
                continue
            rows = [self._row(row) for row in ids.tolist()]
            found[name] = torch.tensor([[new for new, _ in row] for row in rows], dtype=ids.dtype, device=ids.device)
            places = torch.tensor([[place for _, place in row] for row in rows], device=ids.device)
            for other in beside:
                if isinstance(batch.get(other), Tensor) and batch[other].shape == ids.shape:
                    found[other] = batch[other].gather(1, places)
        return found

    def _row(self, row: Sequence[int]) -> list[tuple[int, int]]:
        """New tokens, each with the place of the old one that it comes from, as many as there were."""
        found = [(new, place) for place, old in enumerate(row) for new in self.ids(old)]
        return found[: len(row)]

    def ids(self, old: int) -> tuple[int, ...]:
        """The tokens that stand for one of before; negative numbers (labels that do not count) as they are."""
        if old < 0:
            return (old,)
        if old in self.new_ids:
            return (self.new_ids[old],)
        if old not in self.spelled:
            raise CalibrationError(f"a batch has token {old}, which the smaller tokenizer has no spelling for")
        return self.spelled[old]

    def undone(self, batch: Batch) -> dict[str, Any]:
        """A batch that was renumbered, in the tokens of before."""
        old_ids = torch.tensor(sorted(self.new_ids))
        found = dict(batch)
        for name in COMPANIONS:
            if isinstance(ids := batch.get(name), Tensor) and not ids.is_floating_point():
                found[name] = torch.where(ids < 0, ids, old_ids.to(ids.device)[ids.clamp_min(0)])
        return found


def _sample(model: PreTrainedModel, batches: Sequence[Batch], left: int) -> dict[str, Any] | None:
    """A small batch in the tokens of now, of which the model has `left`.

    None for models that read more than text, where no batch shows what.
    """
    if batches:
        rows = {len(v) for v in batches[0].values() if isinstance(v, Tensor) and v.dim()}
        return {k: v[:1] if len(rows) == 1 and isinstance(v, Tensor) and v.dim() else v for k, v in batches[0].items()}
    reads = inputs_of(model)
    if reads.main != "input_ids" or reads.media:
        return None
    ids = torch.linspace(0, left - 1, SAMPLE).long()[None]
    return {"input_ids": ids, **({"decoder_input_ids": ids} if reads.seq2seq else {})}


def _outputs(model: PreTrainedModel, batch: Batch) -> Tensor:
    with torch.no_grad():
        found = model(**model_inputs(model, batch), return_dict=True)
    for name in ("logits", "last_hidden_state", "text_embeds"):
        if isinstance(found.get(name), Tensor):
            value: Tensor = found[name]
            return value
    raise ArchitectureError(f"nothing in the outputs of {type(model).__name__} tells whether its vocabulary is right")


def _compare(before: Tensor, after: Tensor) -> None:
    """Raises ArchitectureError unless the outputs are the same up to rounding."""
    allowed = (1e-4 if before.dtype == torch.float32 else 2e-2) * float(before.float().abs().max()) + 1e-30
    if before.shape != after.shape or not float((before.float() - after.float()).abs().max()) <= allowed:
        raise ArchitectureError(
            "the model's outputs changed with its vocabulary, so something in it depends on the numbers of tokens in a "
            "way that is not known; the model is half done: load it again and take the vocabulary step out"
        )
