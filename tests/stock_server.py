"""Run in a process of its own that never imports hf_shrink: load checkpoints in stock transformers, keep what they say.

Reads lines of JSON, `[{"folder": ..., "class": ..., "ids": ...}, ...]`, and answers each with a line when it is done.
Writes into each folder stock.pt, or stock.txt with the error. In place of "ids" (stock.pt: the logits) a job has
"inputs", a file with a list of dicts of model inputs (for each its logits and what the model generates), "text" (its
ids by the folder's tokenizer, the logits, what the model generates), or "method" and "given", a file with its arguments
(what it returns, called before anything else).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers


def generated(model: Any, batch: dict[str, Any], new: int, **options: Any) -> torch.Tensor:
    return model.generate(**batch, do_sample=False, max_new_tokens=new, **options)


def outcome(job: dict[str, Any], folder: Path) -> Any:
    model = getattr(transformers, job["class"]).from_pretrained(folder).eval()
    if "method" in job:
        found = getattr(model, job["method"])(**torch.load(job["given"]))
        return found if isinstance(found, torch.Tensor) else found.pooler_output
    if "inputs" in job:
        batches = torch.load(job["inputs"])
        return [(model(**batch).logits, generated(model, batch, 4, min_new_tokens=4)) for batch in batches]
    if "text" in job:
        found = transformers.AutoTokenizer.from_pretrained(folder)(job["text"])["input_ids"]
        ids = torch.tensor([found])
        return found, model(ids).logits[0], generated(model, {"input_ids": ids}, 8)
    ids = torch.tensor(job["ids"])
    extra = {"decoder_input_ids": ids} if getattr(model.config, "is_encoder_decoder", False) else {}
    return model(ids, **extra)[0]


def main() -> None:
    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        for job in json.loads(line):
            folder = Path(job["folder"])
            try:
                with torch.no_grad():
                    torch.save(outcome(job, folder), folder / "stock.pt")
            except Exception as error:  # any error is a result here: the test looks at it
                (folder / "stock.txt").write_text(f"{type(error).__name__}: {error}")
        assert not any(name.split(".")[0] == "hf_shrink" for name in sys.modules)
        print("done", file=answers, flush=True)


main()
