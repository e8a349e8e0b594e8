"""Save a shrunken model so that `from_pretrained` gives it back: the config's block, the record and the card go along.

`bind` puts this behind the model's own `save_pretrained` and `push_to_hub`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from transformers import BitsAndBytesConfig, PreTrainedModel

from hf_shrink.architectures.adapters import without_adapters
from hf_shrink.checkpoint.format import PRUNED_METHOD, quantization_config
from hf_shrink.checkpoint.packed import packed_schemes
from hf_shrink.checkpoint.portability import portability, rounded_otherwise
from hf_shrink.checkpoint.push import push_shrunk_to_hub
from hf_shrink.checkpoint.record import ShrinkRecord
from hf_shrink.checkpoint.shards import one_layout
from hf_shrink.checkpoint.streamed import save_streamed
from hf_shrink.checkpoint.ties import saved_state, settle_ties
from hf_shrink.errors import CheckpointError
from hf_shrink.report import ShrinkReport
from hf_shrink.residence import at_home, residence_of
from hf_shrink.surgery import build_skeleton, is_uneven
from hf_shrink.surgery.sizes import RECORD_FORMAT

EMPTY_MARKER: dict[str, Any] = {"format": RECORD_FORMAT, "shapes": {}, "attributes": {}}


class _BoundSave:
    """`save_pretrained` of one model. An object that holds the model, so that a deep copy or a pickle of the model
    gets one that saves the copy."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        save_model(self.model, save_directory, *args, **kwargs)


class _BoundPush:
    """`push_to_hub` of one model, as `_BoundSave`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(self, repo_id: str, **kwargs: Any) -> Any:
        return push_model(self.model, repo_id, **kwargs)


def bind(model: PreTrainedModel, record: ShrinkRecord | None = None) -> None:
    """Make the model save itself as `save_model` does, in place.

    Also settles what depends on which modules are packed: tied weights, `config.tie_word_embeddings`, the marker
    `config.hf_shrink`. Call again when modules were packed since.

    Args:
        model: pruned, compressed or both.
        record: becomes `model.shrink_record`, and its report `model.shrink_report`.
    """
    if record is not None:
        vars(model).update(shrink_record=record, shrink_report=record.report)
    if getattr(model.config, "hf_shrink", None) is None:
        model.config.hf_shrink = dict(EMPTY_MARKER)
    settle_ties(model)
    for module in model.modules():  # a part of the model can be saved on its own, with the same needs
        if isinstance(module, PreTrainedModel):
            vars(module).update(save_pretrained=_BoundSave(module), push_to_hub=_BoundPush(module))


def save_model(
    model: PreTrainedModel,
    directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: dict[str, Any] | None = None,
    push_to_hub: bool = False,
    **kwargs: Any,
) -> None:
    """transformers' `save_pretrained` for a shrunken model, with its arguments (`max_shard_size`, `variant`, ...).

    Writes what it writes, with our block in config.json, and shrink.json and README.md when the model has a
    `shrink_record` (with a card). Weights of an earlier save that `from_pretrained` would read instead are removed.
    Adapters that PEFT has put into the model are left out: its own `save_pretrained` writes them.

    Raises:
        CheckpointError: the model is uneven in a way that stock transformers would load wrong without an error.
    """
    directory = Path(directory)
    hub = {name: kwargs.pop(name) for name in _HUB_OPTIONS if name in kwargs} if push_to_hub else {}
    streams = residence_of(model) is not None and getattr(model, "hf_quantizer", None) is None and not kwargs
    with _without_adapters_beside(model), one_layout(directory, kwargs.get("variant"), is_main_process):
        with at_home(model), _block_in_config(model):
            state = saved_state(model, state_dict)
            with _handed_through(model, state):
                type(model).save_pretrained(
                    model, directory, is_main_process, {} if streams else state, push_to_hub=False, **kwargs
                )
        if streams:
            save_streamed(model, directory, state)
    record = getattr(model, "shrink_record", None)
    if record is not None and is_main_process:
        record.write(directory)
    if push_to_hub and is_main_process:
        repo_id = hub.pop("repo_id", directory.name)
        shard = {"max_shard_size": kwargs["max_shard_size"]} if "max_shard_size" in kwargs else {}
        push_model(model, repo_id, token=kwargs.get("token"), **shard, **hub)


_HUB_OPTIONS = ("repo_id", "commit_message", "commit_description", "private", "create_pr", "revision", "tags")


def push_model(model: PreTrainedModel, repo_id: str, **kwargs: Any) -> Any:
    """transformers' `push_to_hub` for a shrunken model, with its arguments: record, report and the model's own card go
    up instead of a generic one. A model without a record goes the stock way."""
    if getattr(model, "shrink_record", None) is None:
        return type(model).push_to_hub(model, repo_id, **kwargs)
    return push_shrunk_to_hub(model, repo_id, **kwargs)


def config_block(model: PreTrainedModel) -> dict[str, Any] | None:
    """The `quantization_config` that a checkpoint of this model carries; None when it needs none."""
    schemes = packed_schemes(model)
    stock = getattr(model.config, "quantization_config", None)
    if isinstance(stock, BitsAndBytesConfig):
        return dict(stock.to_dict())
    if schemes:
        return quantization_config(model, schemes)
    return {"quant_method": PRUNED_METHOD} if is_uneven(model) else None


def model_portability(model: PreTrainedModel) -> list[str]:
    """Why stock transformers cannot load a checkpoint of this model as it is now; empty when it can."""
    return portability(model, packed_schemes(model))


def report_portability(model: PreTrainedModel, report: ShrinkReport) -> None:
    """Say whether stock loads a checkpoint of this model as it is now, and which inputs it would round otherwise."""
    report.not_portable_because = model_portability(model)
    report.portable = not report.not_portable_because
    if report.portable:
        report.notes += rounded_otherwise(model, packed_schemes(model))


def _without_adapters_beside(model: PreTrainedModel) -> AbstractContextManager[object]:
    """The model without PEFT's adapters, but for those of `add_adapter`: transformers saves these, and nothing else."""
    return nullcontext() if getattr(model, "_hf_peft_config_loaded", False) else without_adapters(model)


@contextmanager
def _block_in_config(model: PreTrainedModel) -> Iterator[None]:
    """The config with our block as a plain dict, which transformers writes as it is (its own class drops keys)."""
    block = config_block(model)
    if block == {"quant_method": PRUNED_METHOD}:
        _check_stock_refuses(model)
    before = vars(model.config).get("quantization_config")
    _set_block(model, block)
    try:
        yield
    finally:
        _set_block(model, before)


@contextmanager
def _handed_through(model: PreTrainedModel, state: dict[str, Any]) -> Iterator[None]:
    """transformers puts what a loaded model's quantizer gives in the place of the state dict: that is to be `state`."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None or not hasattr(quantizer, "given_state"):
        yield
        return
    quantizer.given_state = state
    try:
        yield
    finally:
        quantizer.given_state = None


def _set_block(model: PreTrainedModel, block: Any) -> None:
    if block is not None:
        model.config.quantization_config = block
    elif "quantization_config" in vars(model.config):
        del model.config.quantization_config


def _check_stock_refuses(model: PreTrainedModel) -> None:
    """Stock ignores the unknown method with a warning; a shape that does not fit is what makes it stop."""
    stock = {name: tensor.shape for name, tensor in build_skeleton(model).state_dict().items()}
    if all(stock.get(name) == tensor.shape for name, tensor in model.state_dict().items()):
        raise CheckpointError(
            "the pruned blocks differ from the config only in attributes, which stock transformers would load without "
            "noticing; make the blocks alike, or prune something else with it"
        )
