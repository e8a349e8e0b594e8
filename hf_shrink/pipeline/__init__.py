"""The whole road: a model or a folder, a recipe, and a smaller model."""

from hf_shrink.pipeline.checkpointing import open_checkpoint, shrink_checkpoint
from hf_shrink.pipeline.prune_weights import prune_weights
from hf_shrink.pipeline.shrinking import make_plan, shrink
from hf_shrink.pipeline.sweep import make_front

__all__ = ["make_front", "make_plan", "open_checkpoint", "prune_weights", "shrink", "shrink_checkpoint"]
