"""Adapters by PEFT on dense, packed and bitsandbytes' matrices: merged where the weight is dense, else beside it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_shrink.architectures.binding import bind
from hf_shrink.architectures.linears import MATRIX_TYPES, is_matrix
from hf_shrink.checkpoint.adapters import known_to_peft
from hf_shrink.errors import ArchitectureError
from hf_shrink.runtime.linear import CompressedLinear

SPARSE = 0.05  # share of zeros above which a weight counts as pruned


class Lora:
    """Low-rank adapters on every matrix of the blocks.

    Args:
        rank: of the adapters.
        seed: of their first values; the global generator stays as it is.

    Raises:
        ArchitectureError: there is nothing to put one on, or weights are sparse, which a merge would fill.
    """

    def __init__(self, model: PreTrainedModel, rank: int, seed: int) -> None:
        self.model = model
        targets = adapted_matrices(model)
        self._dense = {p: m for p, m in targets.items() if type(m) in MATRIX_TYPES or is_matrix(m)}
        self.merges = len(self._dense) == len(targets)
        if self.merges:
            _check_not_sparse(self._dense)
        self._wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        config = known_to_peft(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=sorted(targets)))
        self._originals: dict[str, Tensor] = {}
        self._adapters: dict[str, nn.Module] = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.trained: Any = get_peft_model(model, config)

    def untrained(self) -> AbstractContextManager[nn.Module]:
        """With adapters that add nothing yet."""
        return nullcontext(self.trained)

    def finish(self) -> PreTrainedModel | PeftModel:
        """The model with the adapters in its weights; where these are packed, the model with adapters around it."""
        if not self.merges:
            around: PeftModel = self.trained
            return around
        for path, module in self._dense.items():
            weight: Any = module.weight
            self._originals[path], weight.data = weight.data, weight.data.clone()
        self.trained.merge_and_unload(safe_merge=True)
        self._leave()
        return self.model

    def undo(self) -> None:
        if isinstance(self.trained, PeftModel) and hasattr(self.model, "peft_config"):
            self.trained.unload()
        for path, original in self._originals.items():
            self._dense[path].weight.data = original
        self._leave()

    def _leave(self) -> None:
        """Take off what PEFT leaves on a model."""
        vars(self.model).pop("peft_config", None)
        for parameter, wanted in self._wanted:
            parameter.requires_grad_(wanted)


def adapted_matrices(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Every matrix inside the blocks that PEFT puts an adapter on, by path. Raises ArchitectureError without any."""
    blocks = [block.path for block in bind(model).blocks]
    found = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{block}.") for block in blocks)
        if inside and (type(module) is CompressedLinear or _is_stock(module)):
            found[path] = module
    if not found:
        raise ArchitectureError(f"no matrix was found in the blocks of {type(model).__name__} to put an adapter on")
    return found


def _is_stock(module: nn.Module) -> bool:
    """Dense, or one of bitsandbytes' Linears, which derive from torch's."""
    return is_matrix(module) or (isinstance(module, nn.Linear) and type(module).__module__.startswith("bitsandbytes."))


def _check_not_sparse(matrices: dict[str, nn.Module]) -> None:
    for path, module in matrices.items():
        weight: Any = module.weight
        if float((weight.detach() == 0).float().mean()) > SPARSE:
            raise ArchitectureError(
                f"{path} has pruned weights, which an adapter would fill when it is merged; use method 'full', which "
                "keeps zeros"
            )
