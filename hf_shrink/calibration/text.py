"""Text to windows of tokens: read documents, tokenise only as much as is needed, pack, leave out what overlaps."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase

from hf_shrink.calibration.chats import chat_document, is_chat, refused_note
from hf_shrink.calibration.overlap import OverlapFilter
from hf_shrink.errors import CalibrationError
from hf_shrink.progress import ProgressCallback, quiet
from hf_shrink.registry import did_you_mean

Document: TypeAlias = str | list[int]
"""A text, or its token ids where a chat template (or the user) has already made them."""

CHAT_COLUMNS = ("messages", "conversations")
TEXT_COLUMNS = ("text", "content")
PAIR_COLUMNS = ("prompt", "completion")

_CHARACTERS_PER_TOKEN = 32  # how much of a long text is tokenised at first; English has four to five
_DOCUMENTS_AT_ONCE = 64


@dataclass(frozen=True)
class Framing:
    """The special tokens around a window (`prefix`, `suffix`) and between two documents in it (`separator`)."""

    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    separator: tuple[int, ...] = ()


@dataclass
class Windows:
    """Packed windows and what happened on the way.

    Attributes:
        rows: lists of token ids, all of the same length.
        found: how many tokens of text were read.
        dropped: windows left out because they overlap with excluded text.
    """

    rows: list[list[int]] = field(default_factory=list)
    found: int = 0
    dropped: int = 0


def framing_of(tokenizer: PreTrainedTokenizerBase, *, decoder_only: bool) -> Framing:
    """The special tokens that this tokenizer itself puts around a text, so that windows look as the model expects.

    A decoder-only model never gets the closing ones: its windows are cut from the middle of a text.
    """
    # A window's separator is the end-of-text token, or [SEP] where there is none.
    ends = (tokenizer.eos_token_id, tokenizer.sep_token_id)
    separator = tuple([index for index in ends if index is not None][:1])
    encoded = tokenizer("a", return_special_tokens_mask=True)
    ids, special = encoded["input_ids"], encoded["special_tokens_mask"]
    if 0 not in special:
        return Framing(separator=separator)
    first, last = special.index(0), len(special) - 1 - special[::-1].index(0)
    suffix = () if decoder_only else tuple(ids[last + 1 :])
    return Framing(tuple(ids[:first]), suffix, separator)


def read_lines(path: Path) -> list[Mapping[str, Any]]:
    """The rows of a .jsonl file. Raises CalibrationError naming the first line that is not a JSON object."""
    rows: list[Mapping[str, Any]] = []
    # Not splitlines: JSON may hold other ends of lines, such as U+2028, as they are.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise CalibrationError(f"{path} line {number} is not valid JSON: {error}") from error
        if not isinstance(row, dict):
            raise CalibrationError(f'{path} line {number} must be an object such as {{"text": "..."}}')
        rows.append(row)
    if not rows:
        raise CalibrationError(f"{path} has no rows")
    return rows


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises CalibrationError when it is missing, empty or not UTF-8."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not UTF-8 text; convert it first, for example with iconv") from error
    except OSError as error:
        raise CalibrationError(f"cannot read {path}: {error}") from error
    if not text.strip():
        raise CalibrationError(f"{path} is empty")
    return text


def text_columns(
    available: Sequence[str], wanted: Sequence[str] = (), example: Mapping[str, Any] | None = None
) -> tuple[str, ...]:
    """Which columns hold the text: those wanted, else the usual names, else the only column of strings.

    Raises CalibrationError for a wanted column that is not there, and when nothing looks like text.
    """
    for name in wanted:
        if name not in available:
            raise CalibrationError(f"the data has no column {name!r}; {did_you_mean(name, available)}")
    if wanted:
        return tuple(wanted)
    for name in ("input_ids", *CHAT_COLUMNS, *TEXT_COLUMNS):
        if name in available:
            return (name,)
    if set(PAIR_COLUMNS) <= set(available):
        return PAIR_COLUMNS
    strings = [name for name in available if isinstance((example or {}).get(name), str)]
    if len(strings) == 1:
        return (strings[0],)
    raise CalibrationError(
        f"no text column found among {', '.join(available) or 'none'}; rename the one to use to 'text' "
        "(known: text, content, messages, prompt with completion)"
    )


def document_of(row: Mapping[str, Any], columns: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Document:
    """A row as one document: token ids as they are, chats through the chat template, other columns joined.

    Raises CalibrationError when one column holds messages and another one text.
    """
    first = row.get(columns[0])
    if columns[0] == "input_ids" and first is not None:
        mask = [1] * len(first) if row.get("attention_mask") is None else row["attention_mask"]
        return [int(token) for token, real in zip(first, mask, strict=True) if real]
    filled = {name: row[name] for name in columns if row.get(name)}
    chats = {name: value for name, value in filled.items() if is_chat(value)}
    if not chats:
        return "\n\n".join(map(str, filled.values()))
    if others := [name for name in filled if name not in chats]:
        raise CalibrationError(
            f"column {next(iter(chats))!r} holds messages, {others[0]!r} does not, so they do not make one chat; "
            "bring them into one form, or use one of them"
        )
    return chat_document([message for value in chats.values() for message in value], tokenizer)


def pack(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    length: int,
    framing: Framing,
    vocabulary: int,
    overlap: OverlapFilter | None = None,
    progress: ProgressCallback = quiet,
) -> Windows:
    """The first `samples` consecutive windows of `length` tokens, the framing's special tokens included.

    Documents follow each other with the separator between them. Windows that overlap with excluded text are left out
    and later ones taken instead. Only as much text is tokenised as is needed. May return fewer windows than asked.

    Raises CalibrationError when a token lies outside the model's vocabulary, which means the wrong tokenizer.
    """
    content = length - len(framing.prefix) - len(framing.suffix)
    if content < 1:
        raise CalibrationError(f"length {length} leaves no room for text between the special tokens; use a longer one")
    windows = Windows()
    pending: list[int] = []
    for piece in _token_pieces(documents, tokenizer, framing, characters=samples * length * _CHARACTERS_PER_TOKEN):
        if piece and max(piece) >= vocabulary:
            raise CalibrationError(
                f"the tokenizer gave token {max(piece)}, but the model's vocabulary has {vocabulary} entries; "
                "is it the tokenizer of another model?"
            )
        windows.found += len(piece)
        pending += piece
        start = 0
        while start + content <= len(pending) and len(windows.rows) < samples:
            row = pending[start : start + content]
            start += content
            if overlap is not None and overlap.overlaps(str(tokenizer.decode(row))):
                windows.dropped += 1
            else:
                windows.rows.append([*framing.prefix, *row, *framing.suffix])
        del pending[:start]
        progress("reading text", len(windows.rows), samples)
        if len(windows.rows) == samples:
            break
    return windows


def missing(windows: Windows, name: str, samples: int, length: int, refused: Sequence[str]) -> list[str]:
    """Notes about what the data `name` lacks: windows, and chats that were refused for these reasons.

    Raises CalibrationError when there is no window at all.
    """
    notes, found = refused_note(refused, name), f"{name} has {windows.found} tokens"
    overlap = f"; {windows.dropped} windows were left out because they overlap with excluded text"
    dropped = overlap if windows.dropped else ""
    if not windows.rows:
        reasons = "; ".join([f"{found}, but one sample takes {length}{dropped}", *notes])
        raise CalibrationError(f"{reasons}; give more text or a smaller length")
    if len(windows.rows) < samples:
        notes.append(f"{found}, enough for {len(windows.rows)} samples of {length} instead of {samples}{dropped}")
    return notes


def _token_pieces(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, framing: Framing, characters: int
) -> Iterator[list[int]]:
    """Token ids in order. Short documents are tokenised many at a time, long ones only as far as they are read."""
    prefix, separator = framing.prefix, framing.separator
    between: list[int] = []
    for group in _groups(documents, characters):
        if len(group) == 1 and isinstance(group[0], str):
            yield between
            yield from _long_text(group[0], tokenizer, characters)
            between = list(separator)
            continue
        encoded = iter(encode([d for d in group if isinstance(d, str)], tokenizer))
        for document in group:
            ids = next(encoded) if isinstance(document, str) else document
            # Ids made elsewhere may begin with what every window gets anyway.
            if prefix and tuple(ids[: len(prefix)]) == prefix:
                ids = ids[len(prefix) :]
            if not ids:
                continue
            yield between + ids
            # A chat template may have ended the document already.
            between = [] if tuple(ids[-len(separator) :]) == separator else list(separator)


def _groups(documents: Iterable[Document], characters: int) -> Iterator[list[Document]]:
    group: list[Document] = []
    for document in documents:
        if not document:
            continue
        if isinstance(document, str) and len(document) > characters:
            if group:
                yield group
            group = []
            yield [document]
            continue
        group.append(document)
        if len(group) == _DOCUMENTS_AT_ONCE:
            yield group
            group = []
    if group:
        yield group


def _long_text(text: str, tokenizer: PreTrainedTokenizerBase, characters: int) -> Iterator[list[int]]:
    """The tokens of a text, reading a longer start of it each time more are asked for.

    Tokenising a start of a text differs from tokenising it whole only near the cut, so the last eighth of the tokens
    is not used before the cut has moved on: what comes out is what the whole text would give.
    """
    done, size = 0, characters
    while True:
        ids = encode([text[:size]], tokenizer)[0]
        whole = size >= len(text)
        stop = len(ids) if whole else len(ids) - len(ids) // 8 - 1
        yield ids[done:stop]
        if whole:
            return
        done, size = max(done, stop), size * 4


def encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of each text, without special tokens and without a warning about its length."""
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return ids
