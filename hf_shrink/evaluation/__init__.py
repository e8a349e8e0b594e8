"""What a compressed model costs in quality, speed and size."""

from hf_shrink.evaluation.bench import bench_checkpoint
from hf_shrink.evaluation.completion import greedy_completion
from hf_shrink.evaluation.evaluate import evaluate_model, for_report
from hf_shrink.evaluation.metrics import metric_path
from hf_shrink.evaluation.recipes import TaskRecipe
from hf_shrink.evaluation.size import stored_bytes, unique_bytes
from hf_shrink.evaluation.speed import Workload, compare_decode_speed, measure_speed

__all__ = [
    "TaskRecipe",
    "Workload",
    "bench_checkpoint",
    "compare_decode_speed",
    "evaluate_model",
    "for_report",
    "greedy_completion",
    "measure_speed",
    "metric_path",
    "stored_bytes",
    "unique_bytes",
]
