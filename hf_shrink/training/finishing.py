"""Make what was trained real, and let the model save itself so."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from hf_shrink.architectures.binding import same_family
from hf_shrink.checkpoint.record import ShrinkRecord, source_of
from hf_shrink.checkpoint.save import bind, report_portability, save_model
from hf_shrink.checkpoint.ties import settle_ties
from hf_shrink.errors import CheckpointError
from hf_shrink.evaluation.size import unique_bytes
from hf_shrink.pipeline.planning import find_binding
from hf_shrink.plan import Plan
from hf_shrink.report import ShrinkReport
from hf_shrink.reporting.card import model_card
from hf_shrink.reporting.layout import layout_of
from hf_shrink.reporting.source_card import find_source_card
from hf_shrink.runtime.packed import count_parameters
from hf_shrink.surgery import settle_config, settle_generation
from hf_shrink.training.part import Part
from hf_shrink.training.qat.forward import without_quantizers


def first_record(model: nn.Module, recipe: dict[str, Any], report: ShrinkReport) -> ShrinkRecord:
    """The record of a model in training, to which the parts add what they did."""
    config = getattr(model, "config", None)
    return ShrinkRecord(source_of(model), recipe, Plan(str(getattr(config, "model_type", ""))), report)


def make_real(model: PreTrainedModel, parts: Sequence[Part], record: ShrinkRecord) -> None:
    """Let every part change the model in place, and bind `save_pretrained` and `push_to_hub` as `shrink` does."""
    report = record.report
    with without_quantizers(model):  # the dense model has none
        report.parameters_before, report.bytes_before = count_parameters(model), unique_bytes(model)
        binding = find_binding(model)
        report.layout = [] if binding is None else [block.to_dict() for block in layout_of(binding)]
    with torch.no_grad():
        for part in parts:
            part.finish(model, record)
        settle_config(model)
        report.notes += settle_generation(model, record.plan)
    settle_ties(model)
    report_portability(model, report)
    report.parameters_after, report.bytes_after = count_parameters(model), unique_bytes(model)
    config = {"architectures": [type(model).__name__]}
    record.card = model_card(record, config=config, source_card=find_source_card(record.source))
    bind(model, record)


class SaveWhole:
    """`save_pretrained` of a model whose weights FSDP has spread over processes.

    The Trainer gathers a state dict and hands it over on rank 0, where a whole copy is made, cut and written. The model
    in memory stays as it is, masked.
    """

    def __init__(self, model: PreTrainedModel, parts: Sequence[Part], record: Callable[[], ShrinkRecord]) -> None:
        self.model, self.parts, self.record = model, parts, record

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """As `PreTrainedModel.save_pretrained`. Raises CheckpointError without a state dict."""
        if not is_main_process:
            return
        if state_dict is None:
            raise CheckpointError(
                "the weights are spread over processes, which save_pretrained alone cannot gather; use "
                "trainer.save_model()"
            )
        whole = whole_copy(self.model, self.parts, state_dict)
        make_real(whole, self.parts, self.record())
        save_model(whole, save_directory, **kwargs)


def whole_copy(model: PreTrainedModel, parts: Sequence[Part], state_dict: Mapping[str, Tensor]) -> PreTrainedModel:
    """A model like the one given, on the CPU, with the weights of `state_dict`."""
    kind: Any = next(k for k in type(model).__mro__ if not issubclass(k, FSDPModule))
    with no_init_weights():
        whole: Any = kind(copy.deepcopy(model.config))
    same_family(model, whole)
    for part in parts:
        part.attach_copy(whole)
    dtypes = {tensor.dtype for tensor in state_dict.values() if tensor.is_floating_point()}
    if len(dtypes) == 1:
        whole.to(dtypes.pop())
    found = whole.load_state_dict(state_dict, strict=False)
    tied = set(whole.state_dict()) - {name for name, _ in whole.named_parameters()}
    missing = [name for name in found.missing_keys if name not in tied]
    if missing or found.unexpected_keys:
        raise CheckpointError(
            f"the gathered weights do not fit {kind.__name__}: missing {missing[:3]}, unexpected "
            f"{found.unexpected_keys[:3]}; please report this"
        )
    whole.tie_weights()
    made: PreTrainedModel = whole.eval()
    return made
