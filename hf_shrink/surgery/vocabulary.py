"""Cut a model's vocabulary: the rows of its embedding and output head, and every id in its configs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_shrink.architectures.embeddings import token_table
from hf_shrink.errors import ArchitectureError

# Keys of configs whose values are ids of tokens, alone, in lists, in lists of lists, or as values of a mapping.
_ID_KEYS = re.compile(r"(^|_)token_(id|ids|index)$")
_MORE_ID_KEYS = frozenset(
    {"suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids", "lang_to_id", "task_to_id"}
)
_PAIRS = "forced_decoder_ids"  # [place, id]
_OTHER_SIZES = re.compile(r"vocab_size")
_NOT_OF_TEXT = frozenset({"type_vocab_size"})
_MAPS = ("vocabulary_map", "vocab_map")


def vocabulary_rows(model: PreTrainedModel) -> int:
    """Rows of the model's embedding.

    Raises:
        ArchitectureError: it has none, several vocabularies, or something else as large as it.
    """
    rows = len(_embedding(model).weight)
    text = "models with several vocabularies, or ids in a table of their own, keep them whole"
    for config in _configs(model):
        for key, value in vars(config).items():
            other = _OTHER_SIZES.search(key) and key not in _NOT_OF_TEXT and key != "vocab_size"
            if (other and isinstance(value, int) and value) or (key in _MAPS and value):
                raise ArchitectureError(f"the config of this {model.config.model_type!r} model has {key}: {text}")
    known = {id(tensor) for tensor, _ in _tables(model)}
    blocks = _inside_blocks(model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if id(tensor) not in known and rows in (*tensor.shape[:1], *tensor.shape[-1:]) and not blocks.match(name):
            raise ArchitectureError(f"{name} is as large as the vocabulary and is neither embedding nor head: {text}")
    return rows


def special_ids(model: PreTrainedModel) -> set[int]:
    """Every id that the model's configs name."""
    found: set[int] = set()

    def collect(index: int) -> int:
        found.add(index)
        return index

    for config in (*_configs(model), getattr(model, "generation_config", None)):
        for key, value in list(vars(config).items()) if config is not None else ():
            _renumbered(key, value, collect)
    return {index for index in found if index >= 0}


def cut_vocabulary(model: PreTrainedModel, kept: Sequence[int]) -> None:
    """Keep only the rows `kept` of embedding and head, in place, numbered from 0; ids in all configs follow.

    Args:
        kept: ascending ids. Those from the number of rows on have no row, and keep their distance to it.

    Raises:
        ArchitectureError: as `vocabulary_rows`; an id that a config names would be gone.
    """
    rows = vocabulary_rows(model)
    new_ids = {old: new for new, old in enumerate(kept)}
    index = torch.tensor([old for old in kept if old < rows])
    gone = sorted(old for old in special_ids(model) if old < rows and old not in new_ids)
    if gone:
        raise ArchitectureError(f"the model's config names token {gone[0]}, which the plan takes out")

    def moved(old: int) -> int:
        if old < 0 or old in new_ids:
            return new_ids.get(old, old)
        return old - rows + len(index)

    for tensor, dim in _tables(model):
        tensor.data = tensor.data.index_select(dim, index.to(tensor.device))
    for module in model.modules():
        _settle_module(module, rows, len(index), moved)
    for config in _configs(model):
        if getattr(config, "vocab_size", None) == rows:
            config.vocab_size = len(index)
    for owner in (*_configs(model), getattr(model, "generation_config", None)):
        for key, value in list(vars(owner).items()) if owner is not None else ():
            changed = _renumbered(key, value, moved)
            if changed != value:
                setattr(owner, key, changed)


def _settle_module(module: nn.Module, rows: int, left: int, moved: Any) -> None:
    """The numbers that a module keeps beside its tensors."""
    if isinstance(module, nn.Embedding) and module.num_embeddings == rows and len(module.weight) == left:
        module.num_embeddings = left
        if module.padding_idx is not None:
            module.padding_idx = moved(module.padding_idx)
    if isinstance(module, nn.Linear) and module.out_features == rows and len(module.weight) == left:
        module.out_features = left
    if getattr(module, "vocab_size", None) == rows:
        module.vocab_size = left  # type: ignore[assignment]
    if isinstance(module, PreTrainedModel) and isinstance(getattr(module, "padding_idx", None), int):
        module.padding_idx = moved(module.padding_idx)


def _embedding(model: PreTrainedModel) -> nn.Embedding:
    embedding = token_table(model)
    if not isinstance(embedding, nn.Embedding):
        raise ArchitectureError(
            f"{type(model).__name__} has no embedding of tokens of its own, so no vocabulary to cut"
        )
    return embedding


def _tables(model: PreTrainedModel) -> list[tuple[Tensor, int]]:
    """Every tensor with one row a token, once, and the dimension of the tokens; biases of the head among them."""
    embedding, head = _embedding(model), model.get_output_embeddings()
    rows = len(embedding.weight)
    found: dict[int, tuple[Tensor, int]] = {id(embedding.weight): (embedding.weight, 0)}
    if head is not None:
        for name, parameter in head.named_parameters(recurse=False):
            if parameter.shape[0] != rows:
                raise ArchitectureError(
                    f"{name} of the output head has {parameter.shape[0]} rows and the embedding {rows}; vocabularies "
                    "that differ keep all of their tokens"
                )
            found[id(parameter)] = (parameter, 0)
    named = (*model.named_parameters(), *model.named_buffers())
    for name, tensor in named:
        # BERT's bias beside its decoder, BART's buffer of shape (1, tokens).
        if head is not None and name.endswith("bias") and tensor.shape in ((rows,), (1, rows)):
            if not _inside_blocks(model).match(name):
                found[id(tensor)] = (tensor, tensor.dim() - 1)
        # Copies of the embedding in encoder and decoder where a model does not share the object itself.
        elif id(tensor) not in found and tensor.data_ptr() == embedding.weight.data_ptr() and tensor.data_ptr():
            found[id(tensor)] = (tensor, 0)
    return list(found.values())


def _inside_blocks(model: PreTrainedModel) -> re.Pattern[str]:
    """Names of tensors in the numbered modules of a list: blocks, whose widths may equal the vocabulary's by chance."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)]
    return re.compile("|".join(rf"{re.escape(name)}\.\d+\." for name in lists) or r"(?!)")


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Every config object of the model, parts and copies that modules hold included, each once."""
    found: list[PreTrainedConfig] = []

    def add(config: Any) -> None:
        if isinstance(config, PreTrainedConfig) and all(config is not other for other in found):
            found.append(config)
            for part in config.sub_configs:
                add(getattr(config, part, None))

    for module in model.modules():
        add(getattr(module, "config", None))
    return found


def _renumbered(key: str, value: Any, moved: Any) -> Any:
    """The value of a config's key with its ids renumbered; as it is where the key is not about ids."""
    if key == _PAIRS and isinstance(value, list | tuple):
        return [[place, index if index is None else moved(index)] for place, index in value]
    if _ID_KEYS.search(key) or key in _MORE_ID_KEYS:
        return _mapped(value, moved)
    return value


def _mapped(value: Any, moved: Any) -> Any:
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return moved(value)
    if isinstance(value, list | tuple):
        return type(value)(_mapped(part, moved) for part in value)
    if isinstance(value, Mapping):
        return {key: _mapped(part, moved) for key, part in value.items()}
    return value


def named_ids(owner: Any) -> Iterator[tuple[str, Any]]:
    """Attributes of an object (a processor) that hold ids of tokens by their names."""
    yield from ((key, value) for key, value in vars(owner).items() if _ID_KEYS.search(key))
