"""bitsandbytes (NF4 and FP4: Dettmers et al., arXiv 2305.14314; LLM.int8: arXiv 2208.07339). Needs no data.

transformers' own integration does the work, so the checkpoint is a stock one. Tried on bitsandbytes 0.50.2: its CPU
kernel for 4 bits gives wrong weights where blocks of 64 run over the end of a row, which is why `fits` asks for that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from hf_shrink.errors import CalibrationError, RecipeError
from hf_shrink.quantization.base import METHODS, ModelMethod

BLOCK = 64  # inputs that share a scale in NF4 and FP4
ROWS = 32  # outputs that the CPU kernel for AVX512-BF16 packs together
LARGEST = torch.finfo(torch.float16).max  # LLM.int8 rounds by way of float16


@METHODS.register("bitsandbytes")
@dataclass(frozen=True)
class BitsAndBytes(ModelMethod):
    """NF4, FP4 or LLM.int8 by bitsandbytes.

    Attributes:
        double_quant: NF4 and FP4: the scales of the groups of 64 are stored in 8 bits too (4.13 instead of 4.5 bits a
            weight).
        threshold: LLM.int8: input columns with a value above it are multiplied in 16 bits; 0 turns that off.
    """

    double_quant: bool = True
    threshold: float = 6.0
    needs_statistics: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.double_quant, bool):
            raise ValueError(f"double_quant must be true or false, not {self.double_quant!r}")
        if not isinstance(self.threshold, int | float) or self.threshold < 0:
            raise ValueError(f"threshold must be a number of at least 0, not {self.threshold!r}")

    def spares(self, model: nn.Module, weights: Mapping[str, tuple[int, int]], kind: str) -> dict[str, str]:
        """See `ModelMethod.spares`."""
        if not isinstance(model, PreTrainedModel):
            raise RecipeError("method bitsandbytes takes transformers models only; for this module use method: rtn")
        kept = list(model._keep_in_fp32_modules or ())
        reasons = {}
        for path, (out_features, in_features) in weights.items():
            module = model.get_submodule(path)
            if type(module) is not nn.Linear and not isinstance(module, Conv1D):
                reasons[path] = f"bitsandbytes takes Linear only, not {type(module).__name__}"
            elif not should_convert_module(path, kept):
                reasons[path] = "transformers keeps it in float32"
            elif kind != "LLM.int8" and (in_features % BLOCK or out_features % ROWS):
                reasons[path] = (
                    f"{out_features} x {in_features}: in 4 bits bitsandbytes' CPU kernels are right only for outputs "
                    f"in multiples of {ROWS} and inputs in multiples of {BLOCK}"
                )
        return reasons

    def convert(self, model: PreTrainedModel, formats: Mapping[str, str]) -> None:
        """See `ModelMethod.convert`."""
        (kind,) = set(formats.values())
        for path in formats:
            _check_range(path, model.get_submodule(path), kind)
        quantizer = self._quantizer(model, kind, _skipped(model, formats))
        dense = {path: model.get_submodule(path) for path in formats}
        quantizer.preprocess_model(model=model, device_map=None)
        operation = quantizer.get_quantize_ops()
        for path, module in dense.items():
            name = f"{path}.weight"
            made: Any = model.get_submodule(path)
            made.weight = operation.convert({name: [module.weight.data]}, full_layer_name=name, model=model)[name]
            if module.bias is not None:
                made.bias = nn.Parameter(module.bias.data, requires_grad=False)  # type: ignore[arg-type]
            made.train(module.training)
            if kind != "LLM.int8":
                # Else the first inference on a CPU with AVX512-BF16 packs anew and rounds the scales for good, and
                # what is saved then is not what was made.
                made.support_avx512bf16_for_cpu = False
        vars(model)["hf_quantizer"] = quantizer
        quantizer.postprocess_model(model)

    def _quantizer(self, model: PreTrainedModel, kind: str, skipped: list[str]) -> HfQuantizer:
        four_bits = kind != "LLM.int8"
        config = BitsAndBytesConfig(
            load_in_4bit=four_bits,
            load_in_8bit=not four_bits,
            llm_int8_skip_modules=skipped,
            llm_int8_threshold=float(self.threshold),
            bnb_4bit_quant_type=kind.lower() if four_bits else "fp4",
            bnb_4bit_use_double_quant=self.double_quant and four_bits,
            bnb_4bit_compute_dtype=model.dtype if four_bits else None,
        )
        quantizer: HfQuantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
        try:
            quantizer.validate_environment(device_map=None)
        except (ImportError, RuntimeError) as error:
            raise RecipeError(f"bitsandbytes does not run here: {' '.join(str(error).split())}") from error
        return quantizer


def _skipped(model: PreTrainedModel, formats: Iterable[str]) -> list[str]:
    """What stock transformers must be told to leave dense. Raises RecipeError where it would then skip more."""
    chosen = set(formats)
    linears = [path for path, m in model.named_modules() if type(m) is nn.Linear or isinstance(m, Conv1D)]
    skipped = [path for path in linears if path not in chosen]
    for path in chosen:
        if not should_convert_module(path, skipped):
            raise RecipeError(
                f"transformers skips modules by the start or the end of their names, so {path} cannot be quantized "
                "beside one that stays dense; change targets or ignore"
            )
    return skipped


def _check_range(path: str, module: nn.Module, kind: str) -> None:
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    if kind == "LLM.int8" and weight.numel() and float(weight.detach().abs().max()) > LARGEST:
        raise CalibrationError(f"{path} holds weights beyond float16, by which LLM.int8 rounds; use NF4 or ignore it")
