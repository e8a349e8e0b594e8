"""The whole road: a model or a folder, a recipe, and a smaller model."""

from hf_shrink.pipeline.checkpointing import plan_checkpoint, shrink_checkpoint
from hf_shrink.pipeline.prune_weights import prune_weights
from hf_shrink.pipeline.shrinking import make_plan, shrink

__all__ = ["make_plan", "plan_checkpoint", "prune_weights", "shrink", "shrink_checkpoint"]
