"""Vision-language models: a language model that reads the features of images among its tokens."""

from __future__ import annotations

import dataclasses

from hf_shrink.architectures.base import Family, Stack
from hf_shrink.architectures.families import llama_like
from hf_shrink.architectures.families.llama_like import ATTENTION, FOUR_NORMS, STACK


def _text(of: Stack, *types: str) -> tuple[Stack, ...]:
    """A decoder as the text half of a model; with `types`, where that is the text's own model type."""
    text = dataclasses.replace(
        of,
        name="text",
        blocks="language_model.layers",
        config="text_config",
        residual="the features of images come into it from outside of the text",
    )
    return tuple(dataclasses.replace(text, when={"model_type": kind}) for kind in types) or (text,)


# The head size is the hidden size over the number of heads, whatever else the config says.
DERIVED = dataclasses.replace(STACK, attention=dataclasses.replace(ATTENTION, head_size_key=None))
KNOWN = tuple(text for f in llama_like.FAMILIES for stack in f.stacks for text in _text(stack, *f.model_types))

FAMILIES = [
    Family(("gemma3",), _text(FOUR_NORMS), towers=("vision_tower",)),
    # Whatever language model of the table's common form, and whatever image tower, the checkpoint puts together.
    Family(("llava",), KNOWN, towers=("vision_tower",)),
    Family(("qwen2_vl", "qwen2_5_vl"), _text(DERIVED), towers=("visual",)),
]
