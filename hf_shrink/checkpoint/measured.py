"""Open a model to look at or to measure: dense or compressed, by us or by others."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from hf_shrink.checkpoint.record import RECORD_NAME, read_record
from hf_shrink.checkpoint.source import Source, model_class, open_source
from hf_shrink.errors import CheckpointError


@dataclass(frozen=True)
class Measured:
    """A loaded model and where it came from."""

    source: Source
    model: PreTrainedModel


def load_measured(path_or_id: str | os.PathLike[str]) -> Measured:
    """Load any checkpoint in the class it was saved from, in eval mode; packed weights of ours stay packed.

    Raises:
        CheckpointError: it cannot be found or loaded.
    """
    source = open_source(path_or_id, dense=False)
    where = str(source.folder) if source.shards else source.name
    try:
        model = model_class(source).from_pretrained(where, dtype="auto", use_safetensors=True)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise CheckpointError(f"{source.name} does not load: {' '.join(str(error).split())}") from error
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
