"""What of a Trainer's ways to train does not go with `ShrinkCallback`."""

from __future__ import annotations

from accelerate.state import AcceleratorState
from torch import nn
from transformers import TrainerCallback, TrainerState, TrainingArguments

from hf_shrink.errors import ShrinkError
from hf_shrink.training.models import is_peft, unwrapped


def check_trainer(args: TrainingArguments, state: TrainerState, callback: TrainerCallback) -> None:
    """Raises ShrinkError under DeepSpeed, whose engine keeps weights, gradients and scales where only it finds them,
    and for a second ShrinkCallback: neither would know what the other makes of the model."""
    if args.deepspeed is not None:
        raise ShrinkError("ShrinkCallback does not work with DeepSpeed; train with DDP, or with FSDP")
    # A Trainer makes a state when it is made and for every training, and shows it to all of its callbacks.
    if vars(state).setdefault("shrink_callback", id(callback)) != id(callback):
        raise ShrinkError(
            "this Trainer has two ShrinkCallbacks, and neither would know what the other does to the model; give one "
            "ShrinkCallback a recipe with the steps of both, or train twice, with one after the other"
        )


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
