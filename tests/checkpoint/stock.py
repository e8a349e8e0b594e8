"""Run in a process of its own: load checkpoints in stock transformers and keep the logits, or the error.

    python stock.py JOBS.json    [{"folder": ..., "class": ..., "ids": ...}]

Writes stock.pt (logits) or stock.txt (the error) into each folder. With "inputs" (a file with a list of dicts of model
inputs) in place of "ids": for each its logits and what the model generates.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers


def run(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return model(**batch).logits, model.generate(**batch, do_sample=False, max_new_tokens=4, min_new_tokens=4)


def main(jobs: str) -> None:
    torch.set_num_threads(1)
    for job in json.loads(Path(jobs).read_text()):
        folder = Path(job["folder"])
        try:
            model = getattr(transformers, job["class"]).from_pretrained(folder)
            if "inputs" in job:
                torch.save([run(model.eval(), batch) for batch in torch.load(job["inputs"])], folder / "stock.pt")
                continue
            ids = torch.tensor(job["ids"])
            extra = {"decoder_input_ids": ids} if getattr(model.config, "is_encoder_decoder", False) else {}
            with torch.no_grad():
                torch.save(model(ids, **extra)[0], folder / "stock.pt")
        except Exception as error:  # any error is a result here: the test looks at it
            (folder / "stock.txt").write_text(f"{type(error).__name__}: {error}")
    assert not any(name.split(".")[0] == "hf_shrink" for name in sys.modules)


main(sys.argv[1])
