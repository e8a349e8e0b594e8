"""Text from an encoder with a masked-token head: fill in masks, over and over (Wang & Cho, arXiv 1902.04094)."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_shrink.calibration.inputs import has_token_head
from hf_shrink.calibration.sampling import sample_tokens
from hf_shrink.calibration.text import Framing
from hf_shrink.progress import ProgressCallback

# The first sweep fills masks, the second looks at every token again with the others in place.
_SWEEPS = 2
# Positions are taken in this many random groups; those of a group are filled in one forward pass.
_GROUPS = 8
# Logits of one forward pass, in numbers.
_LOGITS = 1 << 25


def mask_token_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> int | None:
    """The id of the mask token of a model with a language-model head, or None."""
    if not has_token_head(model):
        return None
    found = tokenizer.mask_token_id if tokenizer is not None else getattr(model.config, "mask_token_id", None)
    return found if isinstance(found, int) else None


def infill(
    model: PreTrainedModel,
    start: Tensor,
    framing: Framing,
    mask: int,
    choices: Tensor,
    generator: torch.Generator,
    temperature: float,
    progress: ProgressCallback,
) -> Tensor | None:
    """Replace every token of `start` by one that the model puts there given the others.

    Args:
        start: (samples, content) int64, random tokens; one in eight stays at first, so that rows differ.
        choices: ids that may be filled in.
        generator: on the CPU.

    Returns:
        (samples, content) int64, or None when the model's output is not one logit per token of the vocabulary.
    """
    samples, content = start.shape
    prefix, suffix = len(framing.prefix), len(framing.suffix)
    before, after = torch.tensor(framing.prefix, dtype=torch.int64), torch.tensor(framing.suffix, dtype=torch.int64)
    sampler = torch.Generator(device=model.device).manual_seed(generator.initial_seed())
    at_once = max(1, _LOGITS // ((prefix + content + suffix) * (int(choices.max()) + 1)))
    allowed = choices.to(model.device)
    filled = start.clone()
    training = model.training
    model.train(False)
    done, total = 0, _SWEEPS * _GROUPS * -(-samples // at_once)
    try:
        for first in range(0, samples, at_once):
            rows = filled[first : first + at_once]
            seeds = rows.clone()
            rows.fill_(mask)
            for sweep in range(_SWEEPS):
                # A random group of its own for every position of every row.
                group = torch.rand(rows.shape, generator=generator).argsort(dim=1) % _GROUPS
                if sweep == 0:
                    rows[group == _GROUPS - 1] = seeds[group == _GROUPS - 1]
                for index in range(_GROUPS):
                    rows[group == index] = mask
                    framed = torch.cat([before.expand(len(rows), -1), rows, after.expand(len(rows), -1)], dim=1)
                    with torch.no_grad():
                        output = model(
                            input_ids=framed.to(model.device), attention_mask=torch.ones_like(framed).to(model.device)
                        )
                    logits = getattr(output, "logits", getattr(output, "prediction_logits", None))
                    if logits is None or logits.dim() != 3 or logits.shape[-1] <= int(choices.max()):
                        return None
                    logits = logits[:, prefix : prefix + content][(group == index).to(model.device)][:, allowed]
                    rows[group == index] = allowed[sample_tokens(logits, sampler, temperature)].cpu()
                    done += 1
                    progress("filling in masks", done, total)
    finally:
        model.train(training)
    return filled
