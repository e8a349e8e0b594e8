"""Smaller tokenizers of every kind: all texts come back as before, the given ones from the same pieces."""

from __future__ import annotations

import json
import re

import pytest
from tokenizers import Tokenizer, models
from tokenizers_of_all_kinds import EXTRA, KINDS, SEEN, UNSEEN, fast_tokenizer, random_texts, tokenizer_json
from transformers import AutoTokenizer

from hf_shrink.errors import RecipeError
from hf_shrink.pruning.plan_vocabulary import close, fill
from hf_shrink.surgery.tokenizer import (
    AWKWARD,
    check_ids,
    check_pieces,
    check_round_trips,
    fast_json,
    install,
    pieces_of,
    rewrite,
    token_table,
)
from hf_shrink.surgery.tokenizer.rewrite import Rewritten, added_tokens


def kept_for(text: str, seen: str) -> set[int]:
    """What stays where only `seen` is used."""
    tokenizer, pieces, added = Tokenizer.from_str(text), pieces_of(text), added_tokens(text)
    kept = set(tokenizer.encode(seen).ids) | set(added.values()) | {pieces.ids[p] for p in pieces.basic(added)}
    close(kept, pieces)
    return kept


def smaller(kind: str) -> tuple[str, Rewritten]:
    text = tokenizer_json(kind)
    return text, rewrite(text, kept_for(text, SEEN))


@pytest.mark.parametrize("kind", KINDS)
def test_every_text_comes_back_as_before(kind: str) -> None:
    text, after = smaller(kind)
    old, new = Tokenizer.from_str(text), Tokenizer.from_str(after.text)
    assert new.get_vocab_size() < old.get_vocab_size() - 10
    for sample in (SEEN, UNSEEN, EXTRA, *AWKWARD, *random_texts(300)):
        expected = old.decode(old.encode(sample).ids, skip_special_tokens=False)
        assert new.decode(new.encode(sample).ids, skip_special_tokens=False) == expected, sample
    check_round_trips(text, after.text, [SEEN, UNSEEN])


@pytest.mark.parametrize("kind", KINDS)
def test_given_texts_keep_their_pieces(kind: str) -> None:
    text, after = smaller(kind)
    old, new = Tokenizer.from_str(text).encode(SEEN), Tokenizer.from_str(after.text).encode(SEEN)
    assert new.tokens == old.tokens
    assert new.ids == [after.new_ids[index] for index in old.ids]
    assert sorted(after.new_ids.values()) == list(range(len(after.new_ids)))
    assert list(after.new_ids) == sorted(after.new_ids), "the order of tokens stays"
    check_pieces(text, after.text, after.new_ids, [SEEN])
    check_ids(text, after.text, after.new_ids, [old.ids])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_gone_is_spelled_in_what_is_left(kind: str) -> None:
    text, after = smaller(kind)
    left = pieces_of(after.text)
    gone = [token for token, index in token_table(text).items() if index not in after.new_ids]
    for piece in gone:
        found = left.spell(piece)
        assert len(found) > 1 and set(found) <= set(left.ids)
        assert spelled(found) == piece.removeprefix("##")


def spelled(pieces: list[str]) -> str:
    """Pieces as text, bytes joined to characters."""
    joined = "".join(piece.removeprefix("##") for piece in pieces)
    runs = re.sub(
        r"(?:<0x..>)+", lambda run: bytes.fromhex(run[0].replace("<0x", "").replace(">", "")).decode(), joined
    )
    return str(runs)


def test_a_piece_without_those_it_is_merged_from_is_found_out() -> None:
    text = tokenizer_json("byte_level")
    pieces, kept = pieces_of(text), kept_for(text, SEEN)
    long = max((p for p in pieces.ids if pieces.ids[p] in kept and len(p) > 3 and "<" not in p), key=len)
    part = max(pieces.needs(long), key=len)
    broken = rewrite(text, kept - {pieces.ids[part]})
    with pytest.raises(RecipeError, match="cut into other tokens"):
        check_pieces(text, broken.text, broken.new_ids, [SEEN, long.replace("Ġ", " ")])


def test_a_character_that_is_missing_is_found_out() -> None:
    text = tokenizer_json("wordpiece")
    kept = kept_for(text, SEEN) - {token_table(text)["##w"], token_table(text)["w"]}
    with pytest.raises(RecipeError, match="comes back as"):
        check_round_trips(text, rewrite(text, kept).text, [UNSEEN])


def test_numbers_move_everywhere() -> None:
    """Post-processors, padding and added tokens behind the model's own vocabulary."""
    tokenizer = Tokenizer.from_str(tokenizer_json("byte_level"))
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id("<|user|>"), pad_token="<|user|>")
    text = tokenizer.to_str()
    new = Tokenizer.from_str(rewrite(text, kept_for(text, SEEN)).text)
    assert new.token_to_id("<|user|>") == new.get_vocab_size() - 1
    assert new.padding["pad_id"] == new.token_to_id("<|user|>")
    assert new.encode("sand").ids[0] == new.token_to_id("<s>")
    text = tokenizer_json("wordpiece")
    ids = Tokenizer.from_str(rewrite(text, kept_for(text, SEEN)).text).encode("sand").ids
    assert (ids[0], ids[-1]) == (2, 3)


def test_filling_up_keeps_every_piece_reachable() -> None:
    text = tokenizer_json("byte_level")
    pieces, kept = pieces_of(text), kept_for(text, SEEN)
    fill(kept, pieces, 323, 16)
    assert len(kept) % 16 == 0
    by_id = {index: piece for piece, index in pieces.ids.items()}
    for index in kept & by_id.keys():
        assert {pieces.ids[part] for part in pieces.needs(by_id[index])} <= kept


@pytest.mark.parametrize("kind", KINDS)
def test_a_transformers_tokenizer_is_rewritten_in_place_and_as_a_saved_one(kind: str, tmp_path: object) -> None:
    tokenizer, before = fast_tokenizer(kind), fast_tokenizer(kind)
    text = fast_json(tokenizer)
    after = rewrite(text, kept_for(text, SEEN))
    install(tokenizer, after.text)
    assert len(tokenizer) == len(after.new_ids) < len(before)
    assert tokenizer.eos_token == "</s>"
    assert tokenizer.eos_token_id == after.new_ids[before.eos_token_id]
    tokenizer.save_pretrained(str(tmp_path))
    loaded = AutoTokenizer.from_pretrained(str(tmp_path))
    for sample in (SEEN, UNSEEN, *random_texts(40)):
        ids = tokenizer(sample)["input_ids"]
        assert loaded(sample)["input_ids"] == ids
        assert tokenizer.decode(ids) == before.decode(before(sample)["input_ids"])


def test_what_cannot_be_made_smaller_is_refused() -> None:
    word_level = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    with pytest.raises(RecipeError, match="WordLevel"):
        pieces_of(word_level.to_str())
    dropping = json.loads(tokenizer_json("byte_level"))
    dropping["model"]["dropout"] = 0.1
    with pytest.raises(RecipeError, match="at random"):
        pieces_of(json.dumps(dropping))
    holes = json.loads(tokenizer_json("wordpiece"))
    holes["model"]["vocab"]["##ñandu"] = 5000
    with pytest.raises(RecipeError, match=r"##ñandu.*no pieces of their own"):
        pieces_of(json.dumps(holes)).basic(())
    with pytest.raises(RecipeError, match="pass tokenizer="):
        fast_json(None)
    text = tokenizer_json("byte_level")
    with pytest.raises(RecipeError, match="adds by itself"):
        rewrite(text, kept_for(text, SEEN) - {token_table(text)["<s>"]})
