"""What `from_pretrained` needs for checkpoints of ours, registered in transformers by `register()`.

Pruned unevenly: `quant_method: hf_shrink`; the skeleton is resized, and the model is then an ordinary dense one.
Quantized: `quant_method: compressed-tensors`; configs with our marker keep their weights packed, and those that stock
cannot load become loadable. For every other checkpoint the stock class does what it always did.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from transformers import CompressedTensorsConfig, PreTrainedModel
from transformers.core_model_loading import WeightRenaming
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer
from transformers.utils import logging
from transformers.utils.hub import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_shrink.checkpoint.casts import allow_casts
from hf_shrink.checkpoint.experts import without_merging
from hf_shrink.checkpoint.format import NEEDS_HF_SHRINK, OWN_KEY, PRUNED_METHOD
from hf_shrink.checkpoint.inference import optimize_for_inference
from hf_shrink.checkpoint.record import RECORD_NAME, ShrinkRecord, read_record
from hf_shrink.checkpoint.save import bind
from hf_shrink.checkpoint.skeleton import check_loaded, marker, pack, resize, take_experts_apart, targeted, unpack
from hf_shrink.checkpoint.ties import Pair, hold_ties, saved_state, stored_names, tie_modules
from hf_shrink.errors import CheckpointError
from hf_shrink.runtime.experts import separate_modules
from hf_shrink.surgery.sizes import RECORD_FORMAT

logger = logging.get_logger(__name__)
STOCK_METHOD = "compressed-tensors"


def register() -> None:
    """Make transformers load our checkpoints in this process. Calling it again changes nothing."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[PRUNED_METHOD] = HfShrinkConfig
    AUTO_QUANTIZER_MAPPING[PRUNED_METHOD] = HfShrinkQuantizer
    AUTO_QUANTIZATION_CONFIG_MAPPING[STOCK_METHOD] = PackedConfig
    AUTO_QUANTIZER_MAPPING[STOCK_METHOD] = PackedQuantizer


@dataclass
class HfShrinkConfig(QuantizationConfigMixin):
    """`quantization_config` of a model that was only pruned; its shapes are in `config.hf_shrink`."""

    quant_method: Any = field(default=PRUNED_METHOD)  # transformers' enum is closed, its registry takes any string


class HfShrinkQuantizer(HfQuantizer):
    """Resizes the skeleton to the pruned shapes; nothing of it stays on the loaded model."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if marker(model.config) is None:
            raise CheckpointError(
                "config.json says quant_method hf_shrink but has no hf_shrink block with the shapes; copy the "
                "config.json that the checkpoint was saved with"
            )
        resize(model)

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """The model is dense: take the quantizer off, so that `.half()`, a plain Trainer and saving work."""
        for owner, name in (
            (model, "hf_quantizer"),
            (model, "quantization_method"),
            (model.config, "quantization_config"),
        ):
            vars(owner).pop(name, None)
        vars(model)["is_quantized"] = False
        bind(model, _record_beside(model))

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


class PackedConfig(CompressedTensorsConfig):
    """Reads our blocks as well as stock ones; both become a stock CompressedTensorsConfig."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        block = dict(config_dict.get("quantization_config", config_dict))
        if OWN_KEY not in block:
            return CompressedTensorsConfig.from_dict(block, return_unused_kwargs=return_unused_kwargs, **kwargs)
        if block[OWN_KEY] != RECORD_FORMAT:
            raise CheckpointError(f"this checkpoint's block is of format {block[OWN_KEY]!r}; update hf_shrink")
        if block["quantization_status"] == NEEDS_HF_SHRINK:
            block["quantization_status"] = "compressed"
        block.pop("dequantize", None)  # it is there for stock
        found = CompressedTensorsConfig.from_dict(block, return_unused_kwargs=return_unused_kwargs, **kwargs)
        (found[0] if isinstance(found, tuple) else found).made_by_hf_shrink = True
        return found


class LoadingConfig(CompressedTensorsConfig):
    """How `from_pretrained` loads a quantized checkpoint of ours, given as its `quantization_config`. One that was only
    pruned has nothing packed, and loads as always.

    Args:
        optimize: let the weights multiply with fast kernels; see `optimize_for_inference`.
        dequantize: make them dense instead.
    """

    def __init__(self, *, optimize: bool = True, dequantize: bool = False) -> None:
        super().__init__(dequantize=dequantize)
        self.optimize = optimize

    def get_loading_attributes(self) -> dict[str, Any]:
        return {"dequantize": self.dequantize, "optimize": self.optimize}


# transformers merges what the caller gives into what the checkpoint says where both classes have the same name. In a
# pruned model nothing is packed, so that it does what either asks for.
LoadingConfig.__name__ = HfShrinkConfig.__name__ = CompressedTensorsConfig.__name__


class PackedQuantizer(CompressedTensorsHfQuantizer):
    """Keeps the weights of our checkpoints packed, on fast kernels; the stock class for every other one.

    `"dequantize": true` in our files is for stock; weights become dense here only when the caller asks for it, with
    `quantization_config=CompressedTensorsConfig(dequantize=True)` or `model.dequantize()`.
    """

    def __init__(self, quantization_config: CompressedTensorsConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._ours = bool(getattr(quantization_config, "made_by_hf_shrink", False))
        self._to_dense = False
        self._ties: list[Pair] = []
        self.given_state: dict[str, Any] | None = None  # while the model is saved: see `save_model`

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if not self._ours:
            super()._process_model_before_weight_loading(model, **kwargs)  # type: ignore[no-untyped-call]
            return
        self._to_dense, self.quantization_config.dequantize = self.quantization_config.dequantize, False
        resize(model)
        take_experts_apart(model, self.quantization_config.quantization_config)
        pack(model, targeted(model, self.quantization_config.quantization_config))
        self._ties = hold_ties(model)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if not self._ours:
            return cast(PreTrainedModel, super()._process_model_after_weight_loading(model, **kwargs))
        # Saving writes the checkpoint's names already.
        conversions = vars(model).get("_weight_conversions") or []
        vars(model)["_weight_conversions"] = [c for c in conversions if not isinstance(c, _StoredNames)]
        for pair in self._ties:
            tie_modules(model, pair)
        check_loaded(model)
        allow_casts(model)
        bind(model, _record_beside(model))
        if self._to_dense:
            return cast(PreTrainedModel, model.dequantize())
        return optimize_for_inference(model) if getattr(self.quantization_config, "optimize", True) else model

    def _convert_model_for_quantization(self, model: PreTrainedModel) -> None:
        # Stock exchanges modules that it cannot quantize; our checkpoints hold them as they are.
        if not self._ours:
            super()._convert_model_for_quantization(model)  # type: ignore[no-untyped-call]

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        # Stock unpacks experts while it merges them into 3D parameters, and takes all of them for packed. Here they are
        # apart and stored as they are, or dense.
        if self._ours:
            kept = without_merging(weight_conversions, model) if separate_modules(model) else weight_conversions
            names = stored_names(model)
            return [*kept, _StoredNames(names, model.base_model_prefix)] if names else kept
        updated: list[Any] = super().update_weight_conversions(weight_conversions, model)  # type: ignore[no-untyped-call]
        return updated

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[Any, dict[str, str]]:
        # transformers lets this replace the state dict that it was given, so that it has to be the right one.
        if self._ours:
            return saved_state(model) if self.given_state is None else self.given_state, {}
        state, metadata = super().get_state_dict_and_metadata(model)  # type: ignore[no-untyped-call]
        return state, metadata

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        if not self._ours:
            return cast(PreTrainedModel, super()._dequantize(model, dtype=dtype))  # type: ignore[no-untyped-call]
        unpack(model, dtype or model.dtype)
        return model


class _StoredNames(WeightRenaming):
    """From a checkpoint's names of tensors to those of our buffers, with or without the base model's prefix."""

    def __init__(self, names: dict[str, str], prefix: str) -> None:
        super().__init__(list(names), list(names.values()))
        self._names, self._prefix = names, f"{prefix}."

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        for form in (source_key, source_key.removeprefix(self._prefix), self._prefix + source_key):
            if form in self._names:
                return self._names[form], form
        return source_key, None


def _record_beside(model: PreTrainedModel) -> ShrinkRecord | None:
    """The record in the folder that the model was loaded from; None, and a warning when it is damaged, without one."""
    name = str(getattr(model.config, "_name_or_path", None) or "")
    if not name:
        return None
    if Path(name).is_dir():
        path = Path(name) / RECORD_NAME if (Path(name) / RECORD_NAME).is_file() else None
    else:
        found = cached_file(
            name,
            RECORD_NAME,
            revision=getattr(model.config, "_commit_hash", None),
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        path = Path(str(found)) if found is not None else None
    if path is None:
        return None
    try:
        return read_record(path)
    except CheckpointError as error:
        logger.warning(f"Loaded without its record: {error}")
        return None
