"""Small tokenizers of every kind that a vocabulary can be taken out of, trained on the spot."""

from __future__ import annotations

import json
import random
import sys
from functools import cache

from tiny import TEXT, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SEEN = "The tide goes out and leaves the sand. A child counts stones on the shore."
UNSEEN = "Nobody walks along the ridges, nor calls the rocks by name, and loses count at nine."
EXTRA = "Ein Käfer läuft über die Brücke; the naïve café owner of Ångström. 日本語の文 привет мир. "
KINDS = ("byte_level", "byte_fallback", "end_of_word", "wordpiece", "unigram", "unigram_bytes")
_NAMES = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


@cache
def tokenizer_json(kind: str) -> str:
    """The JSON of a tokenizer of one of KINDS."""
    return str(_BUILDERS[kind]().to_str())


def fast_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A transformers tokenizer of one of KINDS, new each time."""
    names = {**_NAMES, "mask_token": "<mask>"} if kind == "wordpiece" else _NAMES
    tokenizer = Tokenizer.from_str(tokenizer_json(kind))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **names)


def random_texts(count: int, seed: int = 1) -> list[str]:
    """Random unicode without surrogates, some of it near what the tokenizers know."""
    draw = random.Random(seed)
    known = sorted(set(TEXT + EXTRA))
    texts = []
    for index in range(count):
        length = draw.randint(1, 30)
        if index % 2:
            texts.append("".join(draw.choice(known) for _ in range(length)))
        else:
            points = (draw.randint(1, sys.maxunicode) for _ in range(length))
            texts.append("".join(chr(p) if not 0xD800 <= p < 0xE000 else " " for p in points))
    return texts


def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str())
    template = [("<s>", tokenizer.token_to_id("<s>"))]
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", template)
    tokenizer.add_special_tokens(["<unk>", "<|user|>"])  # behind the model's own vocabulary
    return tokenizer


def _byte_fallback() -> Tokenizer:
    """As Llama 2 has it: words begin with a mark for the space, what has no piece is spelled in bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(vocab_size=520, special_tokens=special + _BYTES, show_progress=False)
    tokenizer.train_from_iterator([TEXT + EXTRA], trainer)
    whole = json.loads(tokenizer.to_str())
    whole["added_tokens"] = [token for token in whole["added_tokens"] if token["content"] in special]
    return Tokenizer.from_str(json.dumps(whole))


def _end_of_word() -> Tokenizer:
    """As in GPT-1 and CLIP: pieces that end a word are marked."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.BPEDecoder("</w>")
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator([TEXT + EXTRA], trainer)
    return tokenizer


def _wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["<pad>", "<unk>", "<s>", "</s>", "<mask>"]
    trainer = trainers.WordPieceTrainer(vocab_size=320, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([TEXT + EXTRA], trainer)
    tokenizer.post_processor = processors.BertProcessing(("</s>", 3), ("<s>", 2))
    return tokenizer


def _unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=160, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator([TEXT + EXTRA], trainer)
    return tokenizer


def _unigram_bytes() -> Tokenizer:
    whole = json.loads(_unigram().to_str())
    whole["model"]["vocab"] += [[byte, -20.0] for byte in _BYTES]
    whole["model"]["byte_fallback"] = True
    tokenizer = Tokenizer.from_str(json.dumps(whole))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return tokenizer


_BUILDERS = {
    "byte_level": _byte_level,
    "byte_fallback": _byte_fallback,
    "end_of_word": _end_of_word,
    "wordpiece": _wordpiece,
    "unigram": _unigram,
    "unigram_bytes": _unigram_bytes,
}
