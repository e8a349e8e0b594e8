"""Ours and the dense model in a process of its own: `python speed_ours.py JOB`, JSON in and out.

A job: folder, dense, threads, device, prompt, new, prefill, repeats, compiled. It is `hf-shrink bench`.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """The report of `bench_checkpoint`, decoded."""
    import hf_shrink  # noqa: F401  teaches from_pretrained
    from hf_shrink.evaluation.bench import bench_checkpoint
    from hf_shrink.evaluation.speed import Workload
    from hf_shrink.reporting import silence

    with silence():
        report = bench_checkpoint(
            job["folder"],
            baseline=job["dense"],
            workload=Workload(job["prompt"], job["new"], job["prefill"], repeats=job["repeats"]),
            compiled=job["compiled"],
            device=job["device"],
            threads=job["threads"],
        )
    return report.to_dict()


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
