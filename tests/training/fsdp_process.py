"""One of the processes of the test of FSDP: `python fsdp_process.py RANK PROCESSES PORT FOLDER`; 1: no FSDP."""

from __future__ import annotations

import os
import sys
from pathlib import Path

RANK, PROCESSES, PORT, FOLDER = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
os.environ.update(HF_HUB_OFFLINE="1", ACCELERATE_USE_CPU="1", OMP_NUM_THREADS="1")
if PROCESSES > 1:
    os.environ.update(RANK=str(RANK), LOCAL_RANK=str(RANK), WORLD_SIZE=str(PROCESSES))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=PORT)

import torch  # noqa: E402 - reads the environment once
from accelerate import DistributedType, PartialState  # noqa: E402
from transformers import AutoModelForCausalLM, TrainingArguments  # noqa: E402

from hf_shrink import DistillationTrainer  # noqa: E402

torch.set_num_threads(1)
small, dense = (AutoModelForCausalLM.from_pretrained(FOLDER / name) for name in ("small", "dense"))
draw = torch.Generator().manual_seed(0)
data = [{"input_ids": torch.randint(3, 320, (12,), generator=draw)} for _ in range(4)]
sharded = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
arguments = TrainingArguments(
    output_dir=str(FOLDER / "run"),
    use_cpu=True,
    report_to=[],
    save_strategy="no",
    disable_tqdm=True,
    max_steps=4,
    learning_rate=1e-2,
    lr_scheduler_type="constant",
    per_device_train_batch_size=4 // PROCESSES,
    **(sharded if PROCESSES > 1 else {}),
)
if PROCESSES > 1:
    # accelerate shards on accelerators only, torch on CPUs too: let it take its processes for such with accelerators.
    assert arguments.world_size == PROCESSES
    PartialState().distributed_type = DistributedType.MULTI_XPU
trainer = DistillationTrainer(
    small,
    arguments,
    train_dataset=data,
    teacher=dense,
    distillation={"logits": 1.0, "task": 0.0, "hidden": 0.5, "temperature": 1.0},
)
trainer.train()
if PROCESSES > 1:
    held = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in trainer.model.parameters())
    (FOLDER / f"held-{RANK}").write_text(str(held))
trainer.save_model(str(FOLDER / f"trained-{PROCESSES}"))
