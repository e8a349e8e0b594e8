"""Vision-language models: a language model that reads the features of images among its tokens."""

from __future__ import annotations

import dataclasses

from hf_shrink.architectures.base import Family
from hf_shrink.architectures.families.llama_like import ATTENTION, STACK

TEXT = dataclasses.replace(STACK, name="text", blocks="language_model.layers", config="text_config")
# The head size is the hidden size over the number of heads, whatever else the config says.
DERIVED = dataclasses.replace(TEXT, attention=dataclasses.replace(ATTENTION, head_size_key=None))

FAMILIES = [
    Family(("gemma3",), (TEXT,), towers=("vision_tower",)),
    # Whatever language model of the common form, and whatever image tower, the checkpoint puts together.
    Family(("llava",), (TEXT,), towers=("vision_tower",)),
    Family(("qwen2_vl", "qwen2_5_vl"), (DERIVED,), towers=("visual",)),
]
