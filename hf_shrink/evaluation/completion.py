"""One greedy continuation, to look at with one's own eyes."""

from __future__ import annotations

from typing import Any

import torch

from hf_shrink.errors import ArchitectureError
from hf_shrink.evaluation.greedy import greedy_config


@torch.no_grad()
def greedy_completion(model: Any, tokenizer: Any, prompt: str, *, new: int = 48) -> str:
    """What `model` writes after `prompt`, by greedy decoding of at most `new` tokens, without the prompt itself.

    Raises ArchitectureError for a model that does not generate text.
    """
    if not (hasattr(model, "can_generate") and model.can_generate()):
        raise ArchitectureError(f"{type(model).__name__} does not generate text, so it cannot complete a prompt")
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    inputs.pop("token_type_ids", None)  # made by some tokenizers, refused by decoders
    ids = model.generate(**inputs, generation_config=greedy_config(model, new, pad_token_id=tokenizer.pad_token_id))[0]
    start = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    text: str = tokenizer.decode(ids[start:], skip_special_tokens=True)
    return text
