"""Settings for greedy decoding, whatever the model's own generation config asks for."""

from __future__ import annotations

import copy
from typing import Any

from hf_shrink.calibration.inputs import longest_text

_STARTS = 4  # tokens that a decoder may begin with: of a start, a language, a task, and no timestamps
# What a model's own config may set that has no meaning in greedy decoding, or competes with the number of tokens.
_UNSET = ("max_length", "min_length", "temperature", "top_p", "top_k", "min_p", "typical_p", "early_stopping")


def greedy_config(model: Any, new: int, *, exactly: bool = False, pad_token_id: int | None = None) -> Any:
    """A GenerationConfig for at most (or exactly) `new` tokens; `model`'s own keeps its special tokens and stays as is.

    Args:
        model: a model that generates.
        new: tokens; fewer where the decoder beside an encoder has too few positions, unless `exactly`.
        exactly: an early end of text is suppressed.
        pad_token_id: where the config has none; else the end-of-text token is used, as transformers does.
    """
    if model.config.is_encoder_decoder and not exactly:
        limit = longest_text(model, decoder=True)
        new = new if limit is None else max(1, min(new, limit - _STARTS))
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
