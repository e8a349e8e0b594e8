"""The transformers model inside of what a Trainer makes of it."""

from __future__ import annotations

from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils.import_utils import is_peft_available

from hf_shrink.errors import ArchitectureError


def unwrapped(model: nn.Module) -> nn.Module:
    """Without what parallelism and `torch.compile` put around it; a PEFT model stays one."""
    inner: nn.Module = extract_model_from_parallel(model, keep_torch_compile=False)
    return inner


def bare(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself. Raises ArchitectureError without one, or for adapters that cannot be merged."""
    inner = unwrapped(model)
    if is_peft(inner):
        from peft.tuners.tuners_utils import BaseTuner

        if not isinstance(inner.base_model, BaseTuner) or not hasattr(inner.base_model, "merge_and_unload"):
            raise ArchitectureError(
                f"adapters of this kind ({type(inner.base_model).__name__}) cannot be merged into the model, so it "
                "cannot be shrunk with them; use LoRA or another method that changes weights"
            )
        inner = inner.get_base_model()  # type: ignore[operator]
    if not isinstance(inner, PreTrainedModel):
        raise ArchitectureError(f"ShrinkCallback needs a transformers model, not {type(inner).__name__}")
    return inner


def is_peft(model: nn.Module) -> bool:
    """Whether it is a `peft.PeftModel`."""
    if not is_peft_available():
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel)


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP has spread the weights over processes."""
    return any(isinstance(module, FullyShardedDataParallel | FSDPModule) for module in model.modules())


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that is in pieces, for which every process has to come here; others as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
