"""What a compressed model costs in quality, speed and size."""

from hf_shrink.evaluation.completion import greedy_completion
from hf_shrink.evaluation.evaluate import evaluate_model, for_report
from hf_shrink.evaluation.size import stored_bytes, unique_bytes
from hf_shrink.evaluation.speed import compare_decode_speed, decode_speed, forward_latency

__all__ = [
    "compare_decode_speed",
    "decode_speed",
    "evaluate_model",
    "for_report",
    "forward_latency",
    "greedy_completion",
    "stored_bytes",
    "unique_bytes",
]
