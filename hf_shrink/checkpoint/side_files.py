"""What lies beside a model's weights: tokenizer, processor, generation config, templates, pooling."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils.hub import CHAT_TEMPLATE_FILE

from hf_shrink.checkpoint.record import CARD_NAME
from hf_shrink.checkpoint.source import PROCESSOR_FILES, TOKENIZER_FILES, Source, side_file
from hf_shrink.errors import CheckpointError

# Files that hold tokens or their ids. The last lines are of single families, as their `vocab_files_names` say.
TOKEN_FILES = (
    *TOKENIZER_FILES,
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "normalizer.json",
    GENERATION_CONFIG_NAME,
    *("spm.model", "spm_char.model", "sentencepiece.model", "source.spm", "target.spm", "target_vocab.json"),
    *("bpe.codes", "dict.txt", "vocab-src.json", "vocab-tgt.json", "prophetnet.tokenizer", "emoji.json"),
    *("entity_vocab.json", "byte_maps.json", "word_shape.json", "word_pronunciation.json"),
)
MODULES = "modules.json"  # of sentence-transformers: what comes after the model
EMBEDDING_FILES = (MODULES, "config_sentence_transformers.json", "sentence_bert_config.json")
SIDE_FILES = (*PROCESSOR_FILES, *TOKEN_FILES, CHAT_TEMPLATE_FILE, "chat_template.json", *EMBEDDING_FILES)
CHAT_TEMPLATES = "additional_chat_templates"
_OF_MODULE = ("config.json", "model.safetensors", "pytorch_model.bin")


def copy_side_files(source: Source, folder: Path, *, tokens: bool = True) -> str | None:
    """Copy tokenizer, processor, generation config, chat templates and pooling beside the new weights.

    Args:
        tokens: whether the model has the source's tokens; else what holds tokens or their ids is not copied.

    Returns:
        The text of the source's README.md, which is not copied: the new card is made from it. None without one.

    Raises:
        CheckpointError: the source's modules.json is damaged.
    """
    for name, path in side_files(source):
        if name == GENERATION_CONFIG_NAME and (folder / name).is_file():
            continue  # saved with the model, which knows what was cut
        if tokens or name not in TOKEN_FILES:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, folder / name)
    if (source.folder / CHAT_TEMPLATES).is_dir():
        shutil.copytree(source.folder / CHAT_TEMPLATES, folder / CHAT_TEMPLATES, dirs_exist_ok=True)
    card = side_file(source, CARD_NAME)
    return card.read_text(encoding="utf-8") if card is not None else None


def side_files(source: Source) -> Iterator[tuple[str, Path]]:
    """Name and place of everything that is copied but chat templates; of a Hub id it is fetched."""
    for name in SIDE_FILES:
        path = side_file(source, name)
        if path is not None:
            yield name, path
            if name == MODULES:
                found = ((inner, side_file(source, inner)) for inner in module_files(path))
                yield from ((inner, file) for inner, file in found if file is not None)


def module_files(listed: Path) -> list[str]:
    """The files, there or not, of what sentence-transformers does with a model's output: pooling and the like, each in
    a folder that modules.json lists. Raises CheckpointError where that is damaged."""
    try:
        modules = [(str(module["path"]), str(module["type"])) for module in json.loads(listed.read_text("utf-8"))]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{listed} does not list modules ({error!r}); download the model again") from error
    places = [place for place, kind in modules if Path(place).name == place and not kind.endswith("Transformer")]
    return [f"{place}/{name}" for place in places if place for name in _OF_MODULE]
