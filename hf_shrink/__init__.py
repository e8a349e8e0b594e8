"""hf_shrink: the compression plugin for Hugging Face Transformers.

`import hf_shrink` also teaches `from_pretrained` to load the checkpoints that stock transformers cannot.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

from hf_shrink.checkpoint.adapters import known_to_peft, load_adapter
from hf_shrink.checkpoint.inference import optimize_for_inference
from hf_shrink.checkpoint.module import load_module, save_module
from hf_shrink.checkpoint.push import push_shrunk_to_hub
from hf_shrink.checkpoint.quantizers import LoadingConfig
from hf_shrink.checkpoint.quantizers import register as _register
from hf_shrink.errors import (
    ArchitectureError,
    CalibrationError,
    CheckpointError,
    HubError,
    PushInterrupted,
    RecipeError,
    ShrinkError,
)
from hf_shrink.evaluation import bench_checkpoint, evaluate_model
from hf_shrink.front import Front
from hf_shrink.pipeline import make_front, make_plan, prune_weights, shrink, shrink_checkpoint
from hf_shrink.plan import Plan
from hf_shrink.pruning.importance import register_importance
from hf_shrink.pruning.zeros import keep_zeros
from hf_shrink.recipe import Recipe
from hf_shrink.report import ShrinkReport
from hf_shrink.runtime.optimizing import kernel_summary

if TYPE_CHECKING:
    from hf_shrink.training.callback import ShrinkCallback
    from hf_shrink.training.distillation import CachedTeacher, DistillationTrainer, cache_teacher
    from hf_shrink.training.recovery import Recovered, recover, recover_checkpoint

try:
    __version__ = metadata.version("hf_shrink")
except metadata.PackageNotFoundError:  # run from a source tree
    __version__ = "unknown"

_register()

# What needs transformers' Trainer or PEFT, which take seconds to import: by name, the module that has it.
_LAZY = {
    "ShrinkCallback": "hf_shrink.training.callback",
    **dict.fromkeys(("CachedTeacher", "DistillationTrainer", "cache_teacher"), "hf_shrink.training.distillation"),
    **dict.fromkeys(("Recovered", "recover", "recover_checkpoint"), "hf_shrink.training.recovery"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


__all__ = [
    "ArchitectureError",
    "CachedTeacher",
    "CalibrationError",
    "CheckpointError",
    "DistillationTrainer",
    "Front",
    "HubError",
    "LoadingConfig",
    "Plan",
    "PushInterrupted",
    "Recipe",
    "RecipeError",
    "Recovered",
    "ShrinkCallback",
    "ShrinkError",
    "ShrinkReport",
    "bench_checkpoint",
    "cache_teacher",
    "evaluate_model",
    "keep_zeros",
    "kernel_summary",
    "known_to_peft",
    "load_adapter",
    "load_module",
    "make_front",
    "make_plan",
    "optimize_for_inference",
    "prune_weights",
    "push_shrunk_to_hub",
    "recover",
    "recover_checkpoint",
    "register_importance",
    "save_module",
    "shrink",
    "shrink_checkpoint",
]
