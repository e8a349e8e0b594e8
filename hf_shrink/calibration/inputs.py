"""What a model reads and how much of it, told from its class and config: no model names.

`inputs_of` looks at `main_input_name`, `is_encoder_decoder`, `can_generate()` and the signature of `forward`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.feature_extraction_utils import FeatureExtractionMixin
from transformers.image_processing_utils import BaseImageProcessor

from hf_shrink.architectures.reads import accepted_names
from hf_shrink.errors import CalibrationError

Medium = Literal["text", "image", "audio"]

MEDIA: dict[str, Medium] = {
    "input_ids": "text",
    "pixel_values": "image",
    "input_features": "audio",
    "input_values": "audio",
}


class MediaProcessor(Protocol):
    """An image processor or feature extractor of transformers."""

    def __call__(self, values: Sequence[Any], **options: Any) -> Mapping[str, Any]:
        """Model inputs of images or sounds."""


OWN_BATCHES = "pass calibration= an iterable of model-input dicts (what you would call the model with) instead"


@dataclass(frozen=True)
class ModelInputs:
    """What a model reads.

    Attributes:
        main: name of the main input, for example "input_ids" or "pixel_values".
        text, media: whether it reads text; the name of its image or audio input, or None. Both: a two-tower model.
        seq2seq: it has a decoder that is fed tokens of its own.
        generates: it has a language-model head that transformers' `generate` can sample from.
        accepted: the names of the arguments of `forward`.
    """

    main: str
    text: bool
    media: str | None
    seq2seq: bool
    generates: bool
    accepted: frozenset[str]

    @property
    def medium(self) -> Medium:
        return MEDIA[self.media] if self.media else "text"


def inputs_of(model: nn.Module) -> ModelInputs:
    """What `model` reads. Raises CalibrationError for a model that is not of transformers or reads something else."""
    if not isinstance(model, PreTrainedModel):
        raise CalibrationError(
            f"{type(model).__name__} is not a transformers model, so what it reads is unknown; {OWN_BATCHES}"
        )
    accepted = accepted_names(model) or frozenset()
    main = model.main_input_name
    if main not in MEDIA or main not in accepted:
        raise CalibrationError(f"{type(model).__name__} reads {main!r}, for which no data can be made; {OWN_BATCHES}")
    generates = bool(model.can_generate()) and has_token_head(model)
    seq2seq = bool(model.config.is_encoder_decoder) and "decoder_input_ids" in accepted
    media = None if main == "input_ids" else main
    if main == "input_ids" and not generates:
        media = next((name for name in MEDIA if name != main and name in accepted), None)
    return ModelInputs(main, main == "input_ids", media, seq2seq, generates, accepted)


def has_token_head(model: PreTrainedModel) -> bool:
    """Whether the model has a head with one output per token of its vocabulary."""
    return model.get_output_embeddings() is not None


def settings(config: Any, name: str) -> Iterator[Any]:
    """The values of `name` in a config and in the configs inside it, outermost first, text before other parts."""
    if getattr(config, name, None) is not None:
        yield getattr(config, name)
    # An image tower's config may carry a vocab_size of its own (LLaVA's does), which says nothing of the text.
    for inner in sorted(config.sub_configs, key=lambda part: part != "text_config"):
        if getattr(config, inner, None) is not None:
            yield from settings(getattr(config, inner), name)


def setting(config: Any, *names: str) -> Any:
    """The first value found for any of `names`, or None."""
    return next((value for name in names for value in settings(config, name)), None)


def placeholder_ids(config: Any) -> list[int]:
    """The tokens in whose places a model puts the features of images, videos or sounds."""
    keys = [f"{medium}_token_{end}" for medium in ("image", "video", "audio") for end in ("id", "index")]
    return sorted({value for key in keys for value in settings(config, key) if isinstance(value, int)})


def vocabulary_size(model: PreTrainedModel) -> int:
    """How many token ids the model's text side knows."""
    size = setting(model.config, "vocab_size")
    if not isinstance(size, int):
        raise CalibrationError(f"the config of {type(model).__name__} has no vocab_size; {OWN_BATCHES}")
    return size


def longest_text(model: PreTrainedModel, *, decoder: bool = False) -> int | None:
    """The most tokens the model has positions for, or None when it has no limit."""
    names = ("max_target_positions", "max_position_embeddings") if decoder else ("max_position_embeddings",)
    limit = setting(model.config, *names)
    if not isinstance(limit, int) or limit < 1:
        return None
    # Position tables with a padding row (RoBERTa's way) start counting behind it.
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.num_embeddings == limit and module.padding_idx is not None:
            return limit - module.padding_idx - 1
    return limit


def tokenizer_of(processor: object) -> PreTrainedTokenizerBase | None:
    """The tokenizer itself, or the one inside a processor; None when there is none."""
    inner = getattr(processor, "tokenizer", processor)
    return inner if isinstance(inner, PreTrainedTokenizerBase) else None


def media_processor_of(processor: object) -> MediaProcessor | None:
    """The image processor or feature extractor itself, or the one inside a processor; None when there is none."""
    for part in (processor, *(getattr(processor, n, None) for n in ("image_processor", "feature_extractor"))):
        if isinstance(part, BaseImageProcessor | FeatureExtractionMixin):
            found: MediaProcessor = part  # type: ignore[assignment]
            return found
    return None


def special_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> set[int]:
    """Ids that are not text: special tokens of the tokenizer, and every `..._token_id` of the config."""
    found: set[int] = set(tokenizer.all_special_ids) if tokenizer is not None else set()
    if tokenizer is not None:
        found |= {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    for config in (model.config, getattr(model, "generation_config", None)):
        for key, value in (config.to_dict() if config is not None else {}).items():
            if key.endswith(("_token_id", "_token_index")):
                found |= {v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int)}
    return found


def text_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> torch.Tensor:
    """The ids, int64, that stand for text on their own: not special, not half a character, not padding of the table."""
    size = vocabulary_size(model)
    special = special_ids(model, tokenizer)
    ids = [i for i in range(min(size, len(tokenizer) if tokenizer is not None else size)) if i not in special]
    if tokenizer is not None:
        pieces = tokenizer.batch_decode([[i] for i in ids])
        ids = [i for i, piece in zip(ids, pieces, strict=True) if piece.strip() and "\ufffd" not in piece]
    if not ids:
        raise CalibrationError("the tokenizer has no token that stands for text, so no text can be sampled")
    return torch.tensor(ids)


def need_text(inputs: ModelInputs, model: nn.Module, name: str) -> None:
    """Raises CalibrationError when the data `name` is text and the model reads none."""
    if not inputs.text:
        own = "mini-imagenet" if inputs.medium == "image" else "librispeech"
        raise CalibrationError(
            f"{name} is read as text, but {type(model).__name__} reads {inputs.medium} ({inputs.main}); use "
            f"--calibration self, {own}, a data set with {inputs.medium} in it, or a data recipe, a .yaml file with "
            f"`kind: {inputs.medium}` and, as `dataset`, a folder of {inputs.medium} files"
        )
