"""Compare a smaller tokenizer with the one that it was made from."""

# ruff: noqa: RUF001 - letters of many scripts are the point here

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence

from tokenizers import Tokenizer

from hf_shrink.errors import RecipeError

_AT_ONCE = 256
_SAMPLES = (
    "",
    " ",
    "a",
    "The quick brown fox jumps over 13 lazy dogs.",
    "  leading, doubled  and trailing spaces   ",
    "line\nbreaks\r\nand\ttabs\n\n\n",
    "don't, can't; it's \"quoted\" (and bracketed) [so] {to} <say>: 100% & more @ #5 / $6.70 = ~^_|\\`!?",
    "CamelCase snake_case kebab-case 3.14159e-10 0xDEADBEEF https://example.org/a?b=c&d=%20e#f me@example.org",
    "def f(x):\n    return {'a': [1, 2, 3]}  # ünïcode\n\tif x != y: pass",
    "naïve café résumé Ångström œuvre straße Œ Æ ß İ ı ﬁ",
    "e\u0301 a\u0308 n\u0303 \u1e9b\u0323 \uff21\uff22\uff23 \u00bd \u2460",
    "Привет, мир! Γειά σου Κόσμε. שלום עולם مرحبا بالعالم नमस्ते दुनिया สวัสดีชาวโลก",
    "你好，世界。こんにちは世界 안녕하세요 세계 𠜎𠜱",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈🇪🇺 ☃ ❤️ ∑∫√∞≠≤ →⇒ ♠♣ █▓▒",
    "\u2581under\u2581line \u0120 \u010a ## ##ing [UNK] <unk> <0x41> </w> @@ \u2047",
    "\u200b\u200d\ufeff\u00a0\u2028\u2029\u0000\u0007\u007f\u0085\ue000\ufffd",
    "supercalifragilisticexpialidocious" * 4,
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa 1111111111111111111111111111 ................ --------",
)


def _drawn(count: int) -> Iterator[str]:
    """Random strings: of one script and of all, always the same ones."""
    draw = random.Random(0)
    ranges = ((0x20, 0x7E), (0xA0, 0x24F), (0x370, 0x5FF), (0x900, 0xDFF), (0x3040, 0x9FFF), (0x1F300, 0x1FAFF))
    for index in range(count):
        low, high = ranges[index % len(ranges)] if index % 7 else (0, sys.maxunicode)
        characters = (chr(draw.randint(low, high)) for _ in range(draw.randint(1, 40)))
        yield "".join(c if not "\ud800" <= c <= "\udfff" else " " for c in characters)


AWKWARD: tuple[str, ...] = (*_SAMPLES, *_drawn(140))


def check_round_trips(before: str, after: str, texts: Iterable[str]) -> None:
    """Raises RecipeError naming the first text that no longer comes back from its tokens as it did."""
    old, new = plain(before), plain(after)
    for group in _groups(texts):
        expected, found = _back(old, group), _back(new, group)
        for text, one, other in zip(group, expected, found, strict=True):
            if one != other:
                raise RecipeError(
                    f"with the smaller vocabulary the text {_short(text)} comes back as {_short(other)} instead of "
                    f"{_short(one)}; the tokenizer's vocabulary stays whole"
                )


def check_pieces(before: str, after: str, new_ids: Mapping[int, int], texts: Iterable[str]) -> None:
    """Raises RecipeError naming the first text whose tokens are not the ones of before, renumbered.

    Texts with tokens that are gone are not looked at.
    """
    old, new = plain(before), plain(after)
    for group in _groups(texts):
        expected, found = _ids(old, group), _ids(new, group)
        for text, ids, other in zip(group, expected, found, strict=True):
            if all(index in new_ids for index in ids) and [new_ids[index] for index in ids] != other:
                raise RecipeError(
                    f"with the smaller vocabulary the text {_short(text)} is cut into other tokens; "
                    "the tokenizer's vocabulary stays whole"
                )


def check_ids(before: str, after: str, new_ids: Mapping[int, int], rows: Iterable[Sequence[int]]) -> None:
    """Raises RecipeError naming the first row of tokens that the new tokenizer reads as another text."""
    old, new = plain(before), plain(after)
    for row in rows:
        one = old.decode(list(row), skip_special_tokens=False)
        if one != new.decode([new_ids[index] for index in row], skip_special_tokens=False):
            raise RecipeError(
                f"with the smaller vocabulary the tokens of {_short(one)} mean something else; "
                "the tokenizer's vocabulary stays whole"
            )


def plain(text: str) -> Tokenizer:
    """The tokenizer without truncation and padding."""
    tokenizer = Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _ids(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]


def _back(tokenizer: Tokenizer, texts: list[str]) -> list[str]:
    found: list[str] = tokenizer.decode_batch(_ids(tokenizer, texts), skip_special_tokens=False)
    return found


def _groups(texts: Iterable[str]) -> Iterator[list[str]]:
    group: list[str] = []
    for text in texts:
        group.append(text)
        if len(group) == _AT_ONCE:
            yield group
            group = []
    if group:
        yield group


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
