"""llm-compressor's GPTQ on the checkpoint and the tokens of memory.py; runs in an environment that has it.

python memory_peer.py SOURCE OUTPUT SAMPLES LENGTH
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def main(source: str, output: str, samples: int, length: int) -> None:
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier
    from memory_child import tokens
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.set_num_threads(1)
    wall, cpu = time.perf_counter(), time.process_time()
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    rows = [batch["input_ids"][0].tolist() for batch in tokens(samples, length)]
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * length for _ in rows]})
    # It wants one, also for tokens that are made already.
    unused = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
    oneshot(
        model=model,
        processor=PreTrainedTokenizerFast(tokenizer_object=unused, unk_token="<unk>", pad_token="<unk>"),
        dataset=data,
        recipe=GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"]),
        max_seq_length=length,
        num_calibration_samples=samples,
    )
    model.save_pretrained(output, save_compressed=True)
    status = Path("/proc/self/status").read_text().splitlines()
    peak = 1024 * int(next(line.split()[1] for line in status if line.startswith("VmHWM:")))
    figures = {"peak_mb": round(peak / 1e6, 1), "seconds": round(time.perf_counter() - wall, 1)}
    print(json.dumps({**figures, "cpu_seconds": round(time.process_time() - cpu, 1)}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
