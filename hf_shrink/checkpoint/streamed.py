"""Load and save a model that may be larger than memory: its tensors stay in files, see `residence/`.

transformers reads safetensors by mapping them, so that a loaded model's tensors are the source's files. What it makes
of several tensors, or casts, would be in memory: that goes into files of ours as soon as it is made.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers.core_model_loading as loading
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_shrink.architectures.binding import bind
from hf_shrink.checkpoint.shards import find_shards
from hf_shrink.checkpoint.source import Source, check_finite, load_source_model
from hf_shrink.residence import Residence, residence_of, write_tensors
from hf_shrink.sharding import ranks

SEQUENTIAL = "HF_DEACTIVATE_ASYNC_LOAD"  # transformers' switch: one tensor after the other, not all in threads
UNKNOWN = 1 << 62  # bytes of weights that are not here yet
SHARD = "50GB"  # transformers' own default


def load_streamed(source: Source, scratch: Path, max_memory: int, *, check: bool = True) -> PreTrainedModel:
    """As `load_source_model`, with one block in memory at a time.

    Args:
        scratch: a folder for files that nobody needs once the model is gone.
        max_memory: as of `Residence`.

    Raises:
        CheckpointError: as `load_source_model`.
        ArchitectureError: no blocks were found.
    """
    shards = source.shards
    scratch.mkdir(parents=True, exist_ok=True)
    residence = Residence(scratch, max_memory, sum(shard.stat().st_size for shard in shards) or UNKNOWN)
    with _settling(residence):
        model = load_source_model(source, check=False)
    if not shards:  # of the Hub: they are here only now
        stored = find_shards(source.name, source.folder)
        residence.weigh(sum(shard.stat().st_size for shard in stored))
    binding = bind(model)
    stacks = (*binding.towers, *binding.stacks)
    residence.attach(model, {block.path: block.module for stack in stacks for block in stack.blocks})
    residence.rest_all()
    if check:
        ranks().on_first(lambda: check_finite(model, source.name))
    return model


@contextmanager
def _settling(residence: Residence) -> Iterator[None]:
    """Whatever transformers puts into a model while loading lies in a file before the next tensor is made."""
    put = loading.set_param_for_module
    before = os.environ.get(SEQUENTIAL)

    def settled(model: Any, name: str, value: Tensor, *args: Any) -> None:
        put(model, name, residence.settled(value), *args)

    loading.set_param_for_module = settled  # type: ignore[assignment]
    os.environ[SEQUENTIAL] = "1"
    try:
        yield
    finally:
        loading.set_param_for_module = put
        os.environ.pop(SEQUENTIAL)
        if before is not None:
            os.environ[SEQUENTIAL] = before


def save_streamed(
    model: PreTrainedModel, directory: Path, state: Mapping[str, Tensor], max_shard_size: int | str = SHARD
) -> None:
    """Write the weight files that `save_pretrained` writes of this state dict, one block in memory at a time."""
    residence = residence_of(model)
    done: Callable[[Tensor], None] = residence.glanced_at if residence is not None else lambda tensor: None
    tensors = dict(state)
    for name in model._keys_to_ignore_on_save or ():
        tensors.pop(name, None)
    tensors = remove_tied_weights_from_state_dict(tensors, model)
    values = _Converted(model, tensors, done)
    split = split_torch_state_dict_into_shards(
        values.shapes,
        filename_pattern=SAFE_WEIGHTS_NAME.replace(".safetensors", "{suffix}.safetensors"),
        max_shard_size=max_shard_size,
    )
    for file, names in split.filename_to_tensors.items():
        write_tensors(
            directory / file,
            {name: values.shapes[name] for name in names},
            {"format": "pt"},
            read=values,
            done=done,
        )
    if split.is_sharded:
        index = {
            "metadata": {"total_parameters": model.num_parameters(), **split.metadata},
            "weight_map": split.tensor_to_filename,
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (directory / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")


class _Converted:
    """Tensors under the names that they have in files, made when they are asked for: a block's of one dtype at a time.

    transformers splits what it joined while loading (the experts of a mixture), which copies. Files have one dtype
    after the other and names in their order, so that nothing is made twice.

    Attributes:
        shapes: of all tensors, without values, in the order of the state dict that transformers would save.

    Args:
        done: called with every tensor that is not needed any more.
    """

    def __init__(self, model: PreTrainedModel, tensors: Mapping[str, Tensor], done: Callable[[Tensor], None]) -> None:
        self._model, self._done = model, done
        self.shapes = revert_weight_conversion(model, _shapes(tensors))
        residence = residence_of(model)
        known = set() if residence is None else {id(block) for block in residence.blocks}
        blocks = {path for path, module in model.named_modules() if id(module) in known}
        self._groups: dict[object, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            block = next((path for path in _ancestors(name) if path in blocks), "")
            self._groups.setdefault((block, tensor.dtype), {})[name] = tensor
        self._group_of = self._names()
        if self._group_of.keys() != self.shapes.keys():  # something is made of tensors of several groups
            self._groups = {None: dict(tensors)}
            self._group_of = self._names()
        self._now: object = ()
        self._values: Mapping[str, Tensor] = {}

    def __call__(self, name: str) -> Tensor:
        group = self._group_of[name]
        if group != self._now:
            for tensor in self._groups.get(self._now, {}).values():
                self._done(tensor)
            self._values = {}  # before there is more
            self._now, self._values = group, revert_weight_conversion(self._model, dict(self._groups[group]))
        return self._values[name]

    def _names(self) -> dict[str, object]:
        """Which group a tensor of the files comes from."""
        groups = self._groups.items()
        return {name: key for key, own in groups for name in revert_weight_conversion(self._model, _shapes(own))}


def _ancestors(name: str) -> Iterator[str]:
    """The paths that a tensor lies in."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the same shapes and dtypes without values."""
    return {name: tensor.to("meta") for name, tensor in tensors.items()}
