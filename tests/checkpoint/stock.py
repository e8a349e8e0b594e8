"""Run in a process of its own: load checkpoints in stock transformers and keep the logits, or the error.

    python stock.py JOBS.json    [{"folder": ..., "class": ..., "ids": ...}]

Writes stock.pt (logits) or stock.txt (the error) into each folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers


def main(jobs: str) -> None:
    torch.set_num_threads(1)
    for job in json.loads(Path(jobs).read_text()):
        folder = Path(job["folder"])
        try:
            model = getattr(transformers, job["class"]).from_pretrained(folder)
            ids = torch.tensor(job["ids"])
            extra = {"decoder_input_ids": ids} if getattr(model.config, "is_encoder_decoder", False) else {}
            with torch.no_grad():
                torch.save(model(ids, **extra)[0], folder / "stock.pt")
        except Exception as error:  # any error is a result here: the test looks at it
            (folder / "stock.txt").write_text(f"{type(error).__name__}: {error}")
    assert not any(name.split(".")[0] == "hf_shrink" for name in sys.modules)


main(sys.argv[1])
