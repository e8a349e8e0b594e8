"""Open a model to look at or to measure: dense or compressed, by us or by others."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import cast

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from hf_shrink.checkpoint.adapters import ADAPTER, has_adapter, load_adapter
from hf_shrink.checkpoint.record import RECORD_NAME, read_record
from hf_shrink.checkpoint.source import Source, from_checkpoint, model_class, open_source
from hf_shrink.errors import CheckpointError


@dataclass(frozen=True)
class Measured:
    """A loaded model and where it came from."""

    source: Source
    model: PreTrainedModel


def load_measured(path_or_id: str | os.PathLike[str], dtype: str = "auto", device: str = "cpu") -> Measured:
    """Load any checkpoint in the class it was saved from, in eval mode.

    Packed weights of ours stay packed. An adapter that lies beside the weights is put on.

    Args:
        path_or_id: folder or Hub id.
        dtype: of what is not packed, by torch's name; "auto" keeps what is stored.
        device: where to load it.

    Raises:
        CheckpointError: it cannot be found or loaded, or does not fit the device.
    """
    source = open_source(path_or_id, dense=False)
    # Without a device map transformers does not go through accelerate, as for a user on the CPU.
    where_to = None if device == "cpu" else device
    try:
        model = from_checkpoint(source, dtype=dtype, device_map=where_to)[0]
    except torch.OutOfMemoryError as error:
        raise CheckpointError(f"{source.name} does not fit {device}; take --device cpu (device='cpu')") from error
    if has_adapter(source.folder):
        model = cast(PreTrainedModel, load_adapter(model, source.folder / ADAPTER).get_base_model())
    return Measured(source, model.eval())


def fewer_tokens(measured: Measured) -> bool:
    """Whether tokens were taken out of the model, so that it numbers them otherwise than its dense form."""
    record = measured.source.folder / RECORD_NAME
    return record.is_file() and read_record(record).plan.vocabulary is not None


def source_skeleton(source: Source) -> PreTrainedModel:
    """The source's model on the meta device, from its config alone: shapes and names, no weights."""
    where = str(source.folder)
    config = AutoConfig.from_pretrained(where)
    cls = model_class(source)
    with torch.device("meta"), no_init_weights():
        if issubclass(cls, transformers.PreTrainedModel):
            skeleton: PreTrainedModel = cls(config)
        else:
            skeleton = cls.from_config(config)
    skeleton.tie_weights()
    skeleton.eval()
    return skeleton
