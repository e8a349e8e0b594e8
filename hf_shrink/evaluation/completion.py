"""One greedy continuation, to look at with one's own eyes."""

from __future__ import annotations

from typing import Any

import torch

from hf_shrink.errors import ArchitectureError


@torch.no_grad()
def greedy_completion(model: Any, tokenizer: Any, prompt: str, *, new: int = 48) -> str:
    """What `model` writes after `prompt`, by greedy decoding of at most `new` tokens, without the prompt itself.

    Raises ArchitectureError for a model that does not generate text.
    """
    if not (hasattr(model, "can_generate") and model.can_generate()):
        raise ArchitectureError(f"{type(model).__name__} does not generate text, so it cannot complete a prompt")
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    inputs.pop("token_type_ids", None)  # made by some tokenizers, refused by decoders
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = model.generate(**inputs, max_new_tokens=new, do_sample=False, num_beams=1, pad_token_id=pad)[0]
    start = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    text: str = tokenizer.decode(ids[start:], skip_special_tokens=True)
    return text
