"""Tuning what rounding left over: scales, zero points and norms of the whole model, distilled from the dense one."""

from hf_shrink.tuning.distill import Tuned, tune
from hf_shrink.tuning.options import Tuning
from hf_shrink.tuning.own_text import own_text, spread_evenly
from hf_shrink.tuning.regroup import regrouped
from hf_shrink.tuning.teacher import Teacher

__all__ = ["Teacher", "Tuned", "Tuning", "own_text", "regrouped", "spread_evenly", "tune"]
