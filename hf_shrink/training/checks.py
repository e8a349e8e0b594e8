"""What of a Trainer's ways to train does not go with `ShrinkCallback`."""

from __future__ import annotations

from accelerate.state import AcceleratorState
from torch import nn
from transformers import TrainingArguments

from hf_shrink.errors import ShrinkError
from hf_shrink.training.models import is_peft, unwrapped


def check_deepspeed(args: TrainingArguments) -> None:
    """Raises ShrinkError: its engine keeps weights, gradients and scales where only it finds them."""
    if args.deepspeed is not None:
        raise ShrinkError("ShrinkCallback does not work with DeepSpeed; train with DDP, or with FSDP")


def check_one_device(args: TrainingArguments) -> None:
    """Raises ShrinkError where DataParallel would copy modules that have parameters of their own to learn."""
    if args.n_gpu > 1:
        raise ShrinkError(
            "torch.nn.DataParallel, which Trainer takes for several GPUs in one process, copies modules for every "
            "forward pass, and what is learned for them does not follow; start with torchrun or accelerate launch, "
            "or show one GPU (CUDA_VISIBLE_DEVICES=0)"
        )


def check_sharded(model: nn.Module) -> None:
    """Raises ShrinkError where FSDP leaves no way to a whole model."""
    if is_peft(unwrapped(model)):
        raise ShrinkError(
            "adapters under FSDP cannot be merged into a model whose weights are spread; train with DDP, or without "
            "adapters"
        )
    plugin = AcceleratorState().fsdp_plugin
    if plugin is not None and "FULL" not in str(plugin.state_dict_type):
        raise ShrinkError(
            "trainer.save_model() writes no whole model with FSDP's state_dict_type "
            f"{plugin.state_dict_type}; set state_dict_type: FULL_STATE_DICT in fsdp_config"
        )
