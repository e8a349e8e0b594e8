"""A distillation of one step over labels of different numbers: `python distillation_child.py FILE`, once a process."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from tiny import tiny_llama
from transformers import TrainingArguments

from hf_shrink import DistillationTrainer


def logged(folder: Path, **settings: Any) -> dict[str, float]:
    """What the step logs, of 8 examples in batches of one."""
    draw = torch.Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(3, 320, (10,), generator=draw)} for _ in range(8)]
    for number, example in enumerate(data):
        example["labels"] = example["input_ids"].clone()
        example["labels"][: number + 1] = -100
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        per_device_train_batch_size=1,
        max_steps=1,
        logging_steps=1,
        **settings,
    )
    student, teacher = tiny_llama(1, num_hidden_layers=1), tiny_llama(2, num_hidden_layers=1)
    parts = {"logits": 1.0, "task": 0.5}
    run = DistillationTrainer(student, arguments, train_dataset=data, teacher=teacher, distillation=parts)
    run.train()
    return run.state.log_history[0]


if __name__ == "__main__":
    torch.set_num_threads(1)
    file = Path(sys.argv[1])
    found = logged(file.parent, gradient_accumulation_steps=4, ddp_backend="gloo")
    if os.environ["RANK"] == "0":
        file.write_text(json.dumps(found))
