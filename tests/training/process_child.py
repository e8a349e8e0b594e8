"""One process of test_processes.py: trains, saves, and writes down its masks and scores."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny import tiny_llama
from training.trained import language, trainer

from hf_shrink import ShrinkCallback

SHARDED: dict[str, Any] = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "sync_module_states": False}
SETTINGS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp1": {"fsdp": True, "fsdp_config": {**SHARDED, "version": 1}},
    "fsdp2": {"fsdp": True, "fsdp_config": {**SHARDED, "version": 2}},
}


def main(kind: str, folder: Path, recipe: str) -> None:
    torch.set_num_threads(1)
    callback = ShrinkCallback(json.loads(recipe))
    settings = {"per_device_train_batch_size": 2, "ddp_backend": "gloo", **SETTINGS[kind]}
    run = trainer(tiny_llama(num_hidden_layers=2), language, folder, [callback], **settings)
    run.train()
    run.save_model(str(folder / "saved"))
    save_file(callback.parts[0].tensors(), folder / f"state-{os.environ['RANK']}.safetensors")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
