"""Tiny models with unequal sizes, random weights and a seed, and a small tokenizer: no download."""

from __future__ import annotations

from functools import cache

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXT = (
    "The tide goes out and leaves the sand in ridges. A child walks along them, counting, and loses count at nine. "
    "Nobody on the shore can say how many stones there are, or who first called the rocks by name. "
) * 4
VOCABULARY = 320
# GPTQ without what makes it good and slow, where a test needs a method with statistics and no matter which.
QUICK_GPTQ = {"method": "gptq", "damping": 0.05, "refinements": 0, "rescale": False}


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 320 entries with <s>, </s> and <pad>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=512
    )


def tiny_llama(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    """4 blocks, hidden 48, 6 query heads in 3 KV groups of head size 16, 80 channels, float32, eval mode."""
    settings: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    settings.update(changes)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    # Larger weights than the default initialisation, so that logits differ visibly when something is wrong.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.2)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model.eval()


class MadeUpConfig(LlamaConfig):
    """Of a model type that is in no table."""

    model_type = "made-up"


class Unreadable(LlamaForCausalLM):
    """Has blocks, but reads what nobody knows how to make: its roles cannot be verified."""

    config_class = MadeUpConfig
    main_input_name = "tokens"

    def forward(self, tokens: torch.Tensor, **kwargs: object) -> object:
        return super().forward(input_ids=tokens, **kwargs)


def tiny_unknown() -> Unreadable:
    """The tiny Llama as a type of which nothing can be verified: it can be quantized only."""
    return Unreadable(MadeUpConfig(**tiny_llama().config.to_diff_dict() | {"model_type": "made-up"})).eval()
