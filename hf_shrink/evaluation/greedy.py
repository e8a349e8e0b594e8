"""Settings for greedy decoding, whatever the model's own generation config asks for."""

from __future__ import annotations

import copy
from typing import Any

# What a model's own config may set that has no meaning in greedy decoding, or competes with the number of tokens.
_UNSET = ("max_length", "min_length", "temperature", "top_p", "top_k", "min_p", "typical_p", "early_stopping")


def greedy_config(model: Any, new: int, *, exactly: bool = False, pad_token_id: int | None = None) -> Any:
    """A GenerationConfig for at most (or exactly) `new` tokens; `model`'s own keeps its special tokens and stays as is.

    Args:
        model: a model that generates.
        new: tokens.
        exactly: an early end of text is suppressed.
        pad_token_id: where the config has none; else the end-of-text token is used, as transformers does.
    """
    config = copy.deepcopy(model.generation_config)
    for name in _UNSET:
        setattr(config, name, None)
    config.do_sample, config.num_beams, config.num_return_sequences = False, 1, 1
    config.max_new_tokens, config.min_new_tokens = new, new if exactly else None
    if config.pad_token_id is None:
        end = config.eos_token_id
        end = end[0] if isinstance(end, list) else end
        config.pad_token_id = pad_token_id if pad_token_id is not None else end if end is not None else 0
    return config
