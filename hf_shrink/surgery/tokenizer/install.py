"""Between transformers' tokenizer objects and the JSON of the `tokenizers` library."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_shrink.errors import RecipeError
from hf_shrink.surgery.tokenizer.verify import AWKWARD

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"


def fast_json(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """The JSON of a fast tokenizer. Raises RecipeError for others, and where there is none."""
    if tokenizer is None:
        raise RecipeError("a smaller vocabulary needs its tokenizer; pass tokenizer=")
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise RecipeError(
            f"{type(tokenizer).__name__} is not a tokenizer of the tokenizers library, so its pieces cannot be taken "
            "out safely; load the fast one (AutoTokenizer), or take the vocabulary step out"
        )
    return str(tokenizer.backend_tokenizer.to_str())


def install(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """Make a transformers tokenizer the one of the JSON `text`, in place, by way of a saved folder.

    So what is in memory is what a saved tokenizer gives when it is loaded, ids that its class keeps by name included.

    Raises:
        RecipeError: it does not load as the class that it is, or cuts texts differently there.
    """
    expected = [tokenizer.decode(_encode(tokenizer, sample)) for sample in AWKWARD]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        (Path(folder) / TOKENIZER_FILE).write_text(text, encoding="utf-8")
        _renumber_config(Path(folder) / CONFIG_FILE, text)
        for path in Path(folder).iterdir():  # forms of the whole vocabulary that a class may write beside it
            if path.suffix in (".model", ".txt") or path.name in ("vocab.json", "added_tokens.json"):
                path.unlink()
        loaded = AutoTokenizer.from_pretrained(folder)
    if type(loaded) is not type(tokenizer):
        raise RecipeError(
            f"the smaller tokenizer loads as {type(loaded).__name__}, not as {type(tokenizer).__name__}; "
            "its vocabulary stays whole"
        )
    before, after = json.loads(text), json.loads(loaded.backend_tokenizer.to_str())
    found = [loaded.decode(_encode(loaded, sample)) for sample in AWKWARD]
    if before["model"] != after["model"] or found != expected:
        raise RecipeError(
            f"{type(tokenizer).__name__} changes the smaller tokenizer when it is loaded; its vocabulary stays whole"
        )
    name = tokenizer.name_or_path
    vars(tokenizer).clear()
    vars(tokenizer).update(vars(loaded))
    tokenizer.name_or_path = name


def _encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    return ids


def _renumber_config(path: Path, text: str) -> None:
    """Rewrite `added_tokens_decoder`, which some versions write beside the tokenizer's own file."""
    config = json.loads(path.read_text(encoding="utf-8"))
    decoder = config.get("added_tokens_decoder")
    if not isinstance(decoder, Mapping):
        return
    ids = {token["content"]: token["id"] for token in json.loads(text)["added_tokens"]}
    config["added_tokens_decoder"] = {str(ids[token["content"]]): token for token in decoder.values()}
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
