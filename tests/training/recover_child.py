"""One process of test_recover_processes.py: `python recover_child.py KIND METHOD FOLDER`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

KIND, METHOD, FOLDER = sys.argv[1], sys.argv[2], Path(sys.argv[3])
os.environ.update(HF_HUB_OFFLINE="1", ACCELERATE_USE_CPU="true", GLOO_SOCKET_IFNAME="lo")
if KIND.startswith("fsdp"):
    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION=KIND[-1], FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP")
    os.environ.update(FSDP_TRANSFORMER_CLS_TO_WRAP="LlamaDecoderLayer")

import torch  # noqa: E402 - reads the environment once
from accelerate import DistributedType, PartialState  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from hf_shrink import recover  # noqa: E402
from hf_shrink.errors import ShrinkError  # noqa: E402
from hf_shrink.training.recovery.spread import Stand  # noqa: E402

torch.set_num_threads(1)
rank = int(os.environ["RANK"])
small, dense = (AutoModelForCausalLM.from_pretrained(FOLDER / name) for name in ("small", "dense"))
if rank:
    torch.nn.init.zeros_(small.model.embed_tokens.weight)  # as where only the first process has loaded weights
if KIND.startswith("fsdp"):
    # accelerate shards on accelerators only, torch on CPUs too: let it take its processes for such with accelerators.
    session = sys.modules["hf_shrink.training.recovery.session"]
    made = session._Trainer.__init__

    def on_accelerators(*arguments: Any, **keywords: Any) -> None:
        PartialState().distributed_type = DistributedType.MULTI_XPU
        made(*arguments, **keywords)

    session._Trainer.__init__ = on_accelerators
sys.modules["hf_shrink.training.recovery.recover"].LOGITS = 64 * 320  # two forward passes to a step in one process
held: list[float] = []  # of all weights, how many this process has
give_back = Stand.give_back


def counted(stand: Stand) -> None:
    pieces = [p.to_local() if hasattr(p, "to_local") else p for p in stand.model.parameters()]
    held.append(sum(piece.numel() for piece in pieces) / sum(p.numel() for p in stand._trained.parameters()))
    give_back(stand)


Stand.give_back = counted  # type: ignore[method-assign]
draw = torch.Generator().manual_seed(0)
data = [{"input_ids": torch.randint(3, 20, (4, 16), generator=draw)} for _ in range(36)]
rate = {"lora": 0.005, "full": 0.001}.get(METHOD, 0.01)
options: dict[str, Any] = {"rank": 4} if METHOD == "lora" else {}
options |= {"steps": 12, "tokens": 128, "learning_rate": rate, "held_out": 0.1}
try:
    found = recover(small, teacher=dense, data=data if rank == 0 else [], method=METHOD, progress=False, **options)
except ShrinkError as error:
    (FOLDER / f"{KIND}-{METHOD}-{rank}.error").write_text(str(error))
    sys.exit(0)
assert found.model is small and type(small).__name__ == "LlamaForCausalLM"
assert not any("fsdp" in type(module).__name__.lower() for module in small.modules())
save_file({k: v.clone() for k, v in small.state_dict().items()}, FOLDER / f"{KIND}-{METHOD}-{rank}.safetensors")
figures = {"before": found.before, "after": found.after, "adopted": found.adopted, "steps": found.steps, "held": held}
(FOLDER / f"{KIND}-{METHOD}-{rank}.json").write_text(json.dumps(figures))
