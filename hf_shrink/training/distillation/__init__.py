"""Learning from a teacher, inside transformers' Trainer."""

from hf_shrink.training.distillation.cache import CachedTeacher, cache_teacher
from hf_shrink.training.distillation.options import Distillation
from hf_shrink.training.distillation.trainer import DistillationTrainer

__all__ = ["CachedTeacher", "Distillation", "DistillationTrainer", "cache_teacher"]
