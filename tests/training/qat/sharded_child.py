"""One process of test_sharded.py: a quantize step by hand on a model that FSDP has spread, on the CPU (gloo).

Not by a Trainer: accelerate leaves FSDP out where there is no accelerator.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import tiny_llama
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from training.trained import quantize

from hf_shrink.checkpoint.record import ShrinkRecord
from hf_shrink.pipeline.recipes import load_recipe
from hf_shrink.plan import Plan
from hf_shrink.report import ShrinkReport
from hf_shrink.training.finishing import make_real, whole_copy
from hf_shrink.training.models import is_sharded
from hf_shrink.training.qat.part import QuantizationTraining
from hf_shrink.training.schedule import Window


def main(kind: str, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank, size = distributed.get_rank(), distributed.get_world_size()
    model = tiny_llama(num_hidden_layers=2)
    part = QuantizationTraining(load_recipe({"portable": False, **quantize("W4A16", symmetric=False)}))
    part.attach(model)
    if kind == "fsdp2":
        mesh = init_device_mesh("cpu", (size,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert is_sharded(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    part.begin(model, Window(2, 3, 1))
    part.after_step(0)
    rows = torch.arange(4, 100).view(4, 24)
    mine = rows[rank::size]
    for step in range(1, 7):
        model(input_ids=mine, labels=mine).loss.backward()
        part.before_optimizer_step(step, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        part.after_step(step)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        packed = whole_copy(model, [part], state) if kind == "fsdp2" else model
        make_real(packed, [part], ShrinkRecord("x", {}, Plan("llama"), ShrinkReport()))
        with torch.no_grad():
            logits = packed(rows).logits
        scales = packed.model.layers[1].mlp.down_proj.weight_scale
        save_file({"logits": logits, "scales": scales.clone()}, folder / f"{kind}.safetensors")
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    os._exit(0)  # gloo's threads end slowly
