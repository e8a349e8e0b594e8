"""Sampling tokens with transformers' `generate`, with a generator of our own and rows that never end early."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from hf_shrink.errors import CalibrationError
from hf_shrink.runtime.attention import grouped_attention

# Rows sampled side by side hold one key-value cache between them; this bounds it.
_CACHE_BYTES = 2 << 30
_MOST_ROWS = 64
_FEW_TOKENS = _MOST_ROWS * 512  # rows that hold fewer go with more others


def stream_seed(seed: int, purpose: str) -> int:
    """A seed of its own for each purpose, so that evaluation never sees what calibration saw."""
    return int.from_bytes(hashlib.sha256(f"{purpose}/{seed}".encode()).digest()[:7], "big")


def sample_tokens(logits: Tensor, generator: torch.Generator, temperature: float) -> Tensor:
    """One token id per row, int64, drawn from softmax(logits / temperature).

    Args:
        logits: (rows, vocabulary) of any float dtype; -inf is never drawn.
        generator: on the device of `logits`.
    """
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    if not torch.isfinite(probabilities.sum()):
        raise CalibrationError("the model's logits are NaN or infinite, so no text can be sampled from it")
    if logits.device.type != "cpu":
        # Exponential race, as torch.multinomial does it.
        noise = torch.empty_like(probabilities).exponential_(generator=generator)
        return (probabilities / noise).argmax(dim=-1)
    # On the CPU noise for every logit would cost more than the model: one number per row, inverse of the distribution.
    cumulative = probabilities.cumsum(dim=-1)
    # Just below 1, so that rounding cannot step past the last token with any probability.
    uniform = torch.rand(len(logits), 1, generator=generator) * (1 - 1e-6)
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).squeeze(-1)


class ContinuingSampler(LogitsProcessor):
    """Draws each next token itself and hands `generate` logits that leave it no other choice.

    After an end-of-text token a row goes on with the tokens that `after_end(row)` gives, as packed documents do.

    Args:
        generator: on the model's device; the global random state is not touched.
        banned: (vocabulary,) bool, tokens that are never drawn. They can still be put in by `openings` and `after_end`.
        ends: ids that end a text.
        openings: for each row the tokens that follow the prompt.
        step: called after every token.
    """

    def __init__(
        self,
        *,
        generator: torch.Generator,
        temperature: float,
        banned: Tensor,
        ends: frozenset[int],
        openings: Sequence[Sequence[int]],
        after_end: Callable[[int], Sequence[int]],
        step: Callable[[], None],
    ) -> None:
        self._generator = generator
        self._temperature = temperature
        self._banned = banned.to(generator.device)
        self._ends = ends
        self._pending = [list(tokens) for tokens in openings]
        self._was_drawn = [False] * len(openings)
        self._after_end = after_end
        self._step = step

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.to(self._generator.device).masked_fill(self._banned[: scores.shape[1]], -torch.inf)
        chosen = sample_tokens(scores, self._generator, self._temperature).tolist()
        for row, last in enumerate(input_ids[:, -1].tolist()):
            pending = self._pending[row]
            if self._was_drawn[row] and last in self._ends:
                pending.extend(self._after_end(row))
            self._was_drawn[row] = not pending
            if pending:
                chosen[row] = pending.pop(0)
        self._step()
        ids = torch.tensor(chosen, device=scores.device).unsqueeze(-1)
        return torch.full_like(scores, -torch.inf).scatter_(1, ids, 0.0)


def continue_tokens(
    model: PreTrainedModel, inputs: dict[str, Tensor], new_tokens: int, sampler: ContinuingSampler, pad: int, **ids: int
) -> Tensor:
    """`new_tokens` more tokens for every row of `inputs`, whatever the model's own generation settings.

    Args:
        inputs: what `generate` takes, on any device; moved to the model's.
        ids: further fields of the generation config, for example decoder_start_token_id.

    Returns:
        (rows, tokens) int64 on the CPU, the prompt (or decoder start) included.
    """
    settings = {"do_sample": False, "max_new_tokens": new_tokens, "use_cache": True, "pad_token_id": pad, **ids}
    config = GenerationConfig(**settings)
    moved = {name: value.to(model.device) for name, value in inputs.items()}
    with _generating(model, config), grouped_attention(model), torch.no_grad():
        # The general method: some models (Whisper) override `generate` with one that does more than sample.
        tokens = GenerationMixin.generate(
            model,
            **moved,
            generation_config=config,
            logits_processor=LogitsProcessorList([sampler]),
        )
    assert isinstance(tokens, Tensor)
    return tokens.cpu()


@contextmanager
def _generating(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    # `generate` fills what we leave open from the model's own settings (end token, penalties): put ours in their place.
    own, training = model.generation_config, model.training
    model.generation_config = config
    model.train(False)
    try:
        yield
    finally:
        model.generation_config = own
        model.train(training)


def rows_at_once(model: PreTrainedModel, length: int) -> int:
    """How many rows to sample side by side: as many as keep the key-value cache small, at most 64 (of short ones more).

    Depends on the model and the length only, so that the samples do not depend on the machine's memory.
    """
    config = model.config.get_text_config(decoder=True)
    layers = getattr(config, "num_hidden_layers", 1)
    heads = getattr(config, "num_attention_heads", None) or 1
    size = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 1024) // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    per_row = 2 * layers * groups * size * length * model.dtype.itemsize
    return max(1, min(max(_MOST_ROWS, _FEW_TOKENS // length), _CACHE_BYTES // per_row))
