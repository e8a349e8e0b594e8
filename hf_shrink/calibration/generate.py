"""Calibration text written by the model itself: `data: self`.

Language models write from left to right, as in LLM-QAT (arXiv 2305.17888): every row starts with a random token of the
vocabulary and is sampled from there. Where the tokenizer has a chat template, a share of the rows starts with the
template's opening of a user turn, so that the model writes the question as well as the answer (Magpie, arXiv
2406.08464). Encoders fill in masked tokens (`masked.py`); images and sounds are made in `noise.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_shrink.calibration.inputs import ModelInputs, longest_text, special_ids, text_ids, vocabulary_size
from hf_shrink.calibration.masked import infill, mask_token_of
from hf_shrink.calibration.sampling import ContinuingSampler, continue_tokens, rows_at_once
from hf_shrink.calibration.text import Framing
from hf_shrink.progress import ProgressCallback, quiet

RANDOM_TOKENS = (
    "the model has no language-model head to write text with, so its text is random tokens, which calibrate poorly; "
    "give real text, for example --calibration wikitext"
)
_MARK = "\u2603MARK\u2603"


@dataclass(frozen=True)
class SelfText:
    """Text written by a model: (samples, length) int64 token ids on the CPU, and what the report records about them."""

    rows: Tensor
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ChatTurns:
    """The tokens that a chat template puts before a user turn and between it and the assistant's."""

    user: tuple[int, ...]
    assistant: tuple[int, ...]


@dataclass(frozen=True)
class Writer:
    """A model that writes its own calibration text. The same seed gives the same text.

    Attributes:
        model, inputs, tokenizer: the model, what it reads (`inputs_of`), and its tokenizer if there is one.
        framing: special tokens around a text.
        seed, temperature: of the sampling.
        chat_share: which share of the rows are conversations, where there is a chat template.
    """

    model: PreTrainedModel
    inputs: ModelInputs
    tokenizer: PreTrainedTokenizerBase | None
    framing: Framing
    seed: int
    temperature: float = 1.0
    chat_share: float = 0.5
    progress: ProgressCallback = quiet

    def text(self, samples: int, length: int) -> SelfText:
        """`samples` rows of `length` tokens, special tokens included, for the model's text input.

        What the model can do decides how: sample from left to right; let the decoder of a seq2seq model write; fill in
        masks; or, without a language-model head, draw random tokens, which `details["notes"]` then says.
        """
        details: dict[str, Any] = {"temperature": self.temperature}
        if self.inputs.generates and self.inputs.text and not self.inputs.seq2seq:
            rows, chats = self._from_left_to_right(samples, length)
            return SelfText(
                rows, {**details, "method": "sampled from left to right (arXiv 2305.17888)", "chats": chats}
            )
        generator = torch.Generator().manual_seed(self.seed)
        choices = text_ids(self.model, self.tokenizer)
        content = max(1, length - len(self.framing.prefix) - len(self.framing.suffix))
        random = choices[torch.randint(len(choices), (samples, content), generator=generator)]
        if self.inputs.generates and self.inputs.seq2seq:
            # The only language model here is the decoder: show it random tokens and take what it writes.
            written = self.answers({"input_ids": frame(random, self.framing)}, content + 1)[:, 1:]
            return SelfText(frame(written, self.framing), {**details, "method": "written by the decoder"})
        mask = mask_token_of(self.model, self.tokenizer)
        if mask is not None:
            filled = infill(self.model, random, self.framing, mask, choices, generator, self.temperature, self.progress)
            if filled is not None:
                method = "masked tokens filled in (arXiv 1902.04094)"
                return SelfText(frame(filled, self.framing), {**details, "method": method})
        return SelfText(frame(random, self.framing), {"method": "random tokens", "notes": [RANDOM_TOKENS]})

    def answers(self, inputs: dict[str, Tensor], length: int) -> Tensor:
        """What the decoder of a seq2seq model writes for each row of `inputs`, as its own input: (rows, length) int64.

        Starts with the decoder's start token and what the tokenizer puts behind it. End-of-text is never drawn.
        """
        samples = len(next(iter(inputs.values())))
        start = _decoder_start(self.model)
        opening = _decoder_opening(self.tokenizer, start)[:length]
        banned = _banned(self.model, self.tokenizer)
        banned[[i for i in _ends(self.model, self.tokenizer) if i < len(banned)]] = True
        at_once = rows_at_once(self.model, length)
        generator = torch.Generator(device=self.model.device).manual_seed(self.seed)
        count = _Count(self.progress, samples * (length - 1))
        pieces = []
        for first in range(0, samples, at_once):
            chunk = {name: value[first : first + at_once] for name, value in inputs.items()}
            rows = len(next(iter(chunk.values())))
            if "input_ids" in chunk:
                chunk["attention_mask"] = torch.ones_like(chunk["input_ids"])
            begin = torch.full((rows, 1), start)
            sampler = ContinuingSampler(
                generator=generator,
                temperature=self.temperature,
                banned=banned,
                ends=frozenset(),
                openings=[opening[1:]] * rows,
                after_end=lambda row: (),
                step=count.of(rows),
            )
            if length > 1:
                prompt = {**chunk, "decoder_input_ids": begin}
                begin = continue_tokens(self.model, prompt, length - 1, sampler, start, decoder_start_token_id=start)
            pieces.append(begin)
        return torch.cat(pieces)

    def _from_left_to_right(self, samples: int, length: int) -> tuple[Tensor, int]:
        """Rows of a causal model, and how many are chats. An end-of-text token does not end a row."""
        starts = torch.Generator().manual_seed(self.seed)
        choices = text_ids(self.model, self.tokenizer)
        turns = chat_turns(self.tokenizer) if self.tokenizer is not None else None
        share = self.chat_share if turns is not None else 0.0
        # Spread evenly over the rows: row i is a chat where the running count i * share steps up.
        is_chat = [int((i + 1) * share) > int(i * share) for i in range(samples)]

        def beginning() -> list[int]:
            return [*self.framing.prefix, int(choices[torch.randint(len(choices), (1,), generator=starts)])]

        at_once = rows_at_once(self.model, length)
        generator = torch.Generator(device=self.model.device).manual_seed(self.seed)
        count = _Count(self.progress, samples * (length - 1))
        banned, ends = _banned(self.model, self.tokenizer), _ends(self.model, self.tokenizer)
        pieces = []
        for first in range(0, samples, at_once):
            chats = [_Conversation(turns) if turns and chat else None for chat in is_chat[first : first + at_once]]
            openings = [(chat.next() if chat else beginning())[:length] for chat in chats]
            prompt = torch.tensor([tokens[:1] for tokens in openings])
            sampler = ContinuingSampler(
                generator=generator,
                temperature=self.temperature,
                banned=banned,
                ends=ends,
                openings=[tokens[1:] for tokens in openings],
                after_end=partial(_go_on, chats, beginning),
                step=count.of(len(chats)),
            )
            if length > 1:
                inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
                prompt = continue_tokens(self.model, inputs, length - 1, sampler, pad=int(choices[0]))
            pieces.append(prompt)
        return torch.cat(pieces), sum(is_chat)


def decoder_length(model: PreTrainedModel, length: int) -> int:
    """Tokens on the decoder's side for `length` on the encoder's: a quarter, as answers are shorter than questions."""
    limit = longest_text(model, decoder=True) or length
    return max(1, min(length // 4, limit))


def chat_turns(tokenizer: PreTrainedTokenizerBase) -> ChatTurns | None:
    """What the tokenizer's chat template puts around a user turn; None without a template."""
    if tokenizer.chat_template is None:
        return None
    messages = [{"role": "user", "content": _MARK}]
    text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    before, _, after = text.partition(_MARK)
    ids = tokenizer([before, after], add_special_tokens=False)["input_ids"]
    return ChatTurns(tuple(ids[0]), tuple(ids[1])) if ids[0] and ids[1] else None


def frame(content: Tensor, framing: Framing) -> Tensor:
    """Rows of token ids with the special tokens of `framing` around them."""
    prefix = torch.tensor(framing.prefix, dtype=torch.int64).expand(len(content), -1)
    suffix = torch.tensor(framing.suffix, dtype=torch.int64).expand(len(content), -1)
    return torch.cat([prefix, content, suffix], dim=1)


@dataclass
class _Conversation:
    """What is put in at each turn: the template's opening of the user's, then of the assistant's, and over again."""

    turns: ChatTurns
    user_is_next: bool = True

    def next(self) -> list[int]:
        user, self.user_is_next = self.user_is_next, not self.user_is_next
        # The end token with which the assistant's opening begins has just been drawn.
        return list(self.turns.user if user else self.turns.assistant[1:])


def _go_on(chats: list[_Conversation | None], beginning: Callable[[], list[int]], row: int) -> list[int]:
    """What follows an end-of-text token: the other side of the conversation, or a new text."""
    chat = chats[row]
    return beginning() if chat is None else chat.next()


@dataclass
class _Count:
    """A running count of tokens over chunks of rows."""

    progress: ProgressCallback
    total: int
    done: int = 0

    def of(self, rows: int) -> Callable[[], None]:
        def step() -> None:
            self.done += rows
            self.progress("sampling text", self.done, self.total)

        return step


def _token_ids(model: PreTrainedModel, key: str) -> list[int]:
    """The ids under `key` in the generation config and the config, flat."""
    found = [getattr(getattr(model, "generation_config", None), key, None), getattr(model.config, key, None)]
    flat = [i for value in found for i in (value if isinstance(value, list) else [value])]
    return [i for i in flat if isinstance(i, int)]


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> frozenset[int]:
    own = tokenizer.eos_token_id if tokenizer is not None else None
    return frozenset(_token_ids(model, "eos_token_id") + ([own] if isinstance(own, int) else []))


def _banned(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
    """(vocabulary,) bool: special tokens other than the end, and rows of the table that stand for nothing."""
    size = vocabulary_size(model)
    banned = torch.zeros(size, dtype=torch.bool)
    if tokenizer is not None:
        banned[len(tokenizer) :] = True
    special = special_ids(model, tokenizer) - _ends(model, tokenizer)
    banned[[i for i in special if 0 <= i < size]] = True
    return banned


def _decoder_start(model: PreTrainedModel) -> int:
    found = _token_ids(model, "decoder_start_token_id") + _token_ids(model, "bos_token_id")
    return found[0] if found else 0


def _decoder_opening(tokenizer: PreTrainedTokenizerBase | None, start: int) -> list[int]:
    """The start token, with what the tokenizer puts behind it (Whisper's language and task)."""
    if tokenizer is None:
        return [start]
    encoded = tokenizer("a", return_special_tokens_mask=True)
    special = encoded["special_tokens_mask"]
    prefix: list[int] = encoded["input_ids"][: special.index(0) if 0 in special else 0]
    return prefix if prefix[:1] == [start] else [start]
