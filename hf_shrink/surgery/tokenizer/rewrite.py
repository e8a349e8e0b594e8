"""The smaller tokenizer, as JSON: its model's pieces, and every place that holds a token's number."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from hf_shrink.errors import RecipeError
from hf_shrink.surgery.tokenizer.bpe import BytePairs
from hf_shrink.surgery.tokenizer.pieces import Pieces
from hf_shrink.surgery.tokenizer.unigram import Unigrams
from hf_shrink.surgery.tokenizer.wordpiece import WordPieces


@dataclass(frozen=True)
class Rewritten:
    """A smaller tokenizer.

    Attributes:
        text: its JSON.
        new_ids: for every id that is kept, the new one.
    """

    text: str
    new_ids: Mapping[int, int]


def token_table(text: str) -> dict[str, int]:
    """The id of every token of a tokenizer, added ones included."""
    return dict(Tokenizer.from_str(text).get_vocab(with_added_tokens=True))


def pieces_of(text: str) -> Pieces:
    """The pieces of a tokenizer's model. Raises RecipeError for models that cannot be made smaller safely."""
    whole = json.loads(text)
    model, decodes_bytes = whole["model"], "ByteFallback" in json.dumps(whole.get("decoder"))
    kind = model.get("type") or ("Unigram" if isinstance(model.get("vocab"), list) else None)
    if kind == "BPE":
        return BytePairs.read(model, decodes_bytes=decodes_bytes)
    if kind == "WordPiece":
        return WordPieces.read(model)
    if kind == "Unigram":
        return Unigrams.read(model, decodes_bytes=decodes_bytes)
    raise RecipeError(
        f"a tokenizer of kind {kind or 'unknown'} cannot spell what is taken out of its vocabulary; only byte-pair "
        "encoding, WordPiece and Unigram can: take the vocabulary step out"
    )


def added_tokens(text: str) -> dict[str, int]:
    """Tokens that are found before the model sees a text, special ones among them, and their ids."""
    return {token["content"]: token["id"] for token in json.loads(text)["added_tokens"]}


def rewrite(text: str, kept: Collection[int]) -> Rewritten:
    """A tokenizer with only the tokens `kept`, in their order, numbered from 0.

    Args:
        text: the JSON of the tokenizer.
        kept: ids; may hold some that the tokenizer has no token for. Added tokens must be among them.

    Raises:
        RecipeError: the tokenizer cannot be written so.
    """
    new_ids = {old: new for new, old in enumerate(sorted(kept))}
    whole, pieces = json.loads(text), pieces_of(text)
    order = sorted((index, piece) for piece, index in pieces.ids.items() if index in new_ids)
    whole["model"] = pieces.without(whole["model"], {piece: new_ids[index] for index, piece in order})
    try:
        for token in whole["added_tokens"]:
            token["id"] = new_ids[token["id"]]
        whole["post_processor"] = _processor(whole.get("post_processor"), new_ids)
        if whole.get("padding"):
            whole["padding"]["pad_id"] = new_ids[whole["padding"]["pad_id"]]
    except KeyError as error:
        raise RecipeError(f"token {error} is one that the tokenizer adds by itself; it must stay") from error
    found = json.dumps(whole, ensure_ascii=False)
    _check_numbers(text, found, new_ids)
    return Rewritten(found, new_ids)


def _processor(part: Any, new_ids: Mapping[int, int]) -> Any:
    """The post-processor, which puts special tokens around a text, with new numbers. Raises RecipeError, KeyError."""
    if part is None or part["type"] == "ByteLevel":
        return part
    if part["type"] == "Sequence":
        return {**part, "processors": [_processor(one, new_ids) for one in part["processors"]]}
    if part["type"] == "TemplateProcessing":
        tokens = {
            name: {**token, "ids": [new_ids[index] for index in token["ids"]]}
            for name, token in part["special_tokens"].items()
        }
        return {**part, "special_tokens": tokens}
    if {"sep", "cls"} <= part.keys():
        return {**part, **{name: [part[name][0], new_ids[part[name][1]]] for name in ("sep", "cls")}}
    raise RecipeError(f"the tokenizer's post-processor {part['type']} is not known; its vocabulary stays whole")


def _check_numbers(before: str, after: str, new_ids: Mapping[int, int]) -> None:
    """Raises RecipeError unless the new tokenizer has exactly the kept tokens, under their new numbers."""
    try:
        found = token_table(after)
    except Exception as error:  # the library raises nothing narrower
        raise RecipeError(f"the smaller tokenizer does not load: {error}; its vocabulary stays whole") from error
    wanted = {token: new_ids[index] for token, index in token_table(before).items() if index in new_ids}
    if found != wanted:
        token = min(found.items() ^ wanted.items())[0]
        raise RecipeError(f"the smaller tokenizer would number {token!r} differently; its vocabulary stays whole")
