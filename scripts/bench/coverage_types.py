"""Every model type of transformers that the coverage benchmark looks at, and a tiny model of each."""

from __future__ import annotations

import copy
from typing import Any

import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_shrink.architectures.probe import ProbeError, build
from hf_shrink.architectures.tiny import rebuilt, shrunken

KINDS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "vision": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "audio": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "ctc": "MODEL_FOR_CTC_MAPPING_NAMES",
    "speech": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "base": "MODEL_MAPPING_NAMES",
}
DEPTH = 4
MOST_PARAMETERS = 60_000_000
_DEPTHS = (
    *("num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers", "n_layer", "n_layers", "depth"),
    *("num_decoder_layers", "num_encoder_layers", "encoder_num_hidden_layers", "decoder_num_hidden_layers"),
)
# What the defaults of a type lack or have too much of, before it is made small; "part.key" sets a key of a sub-config.
OVERRIDES: dict[str, dict[str, Any]] = {
    "beit": {"out_features": None, "out_indices": None},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "esm": {"vocab_size": 100, "pad_token_id": 1, "mask_token_id": 4},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8, "head_dim": 128},
    "qwen4_exp_text": {},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xlm": {"vocab_size": 200, "n_layers": 4},
    "flaubert": {"vocab_size": 200, "n_layers": 4},
    "xmod": {"default_language": "en_XX"},
    "timesformer": {"num_frames": 2},
    "swin": {"embed_dim": 48, "num_heads": (3, 3, 3, 3)},
}


def types(kinds: list[str]) -> dict[str, tuple[str, str]]:
    """(kind, class name) of every model type; a type of several kinds is of the first that it is listed under."""
    found: dict[str, tuple[str, str]] = {}
    for kind, mapping in KINDS.items():
        for name, classes in getattr(modeling_auto, mapping).items():
            found.setdefault(name, (kind, classes if isinstance(classes, str) else classes[0]))
    return {name: (kind, cls) for name, (kind, cls) in found.items() if kind in kinds}


def tiny_model(name: str, class_name: str) -> PreTrainedModel:
    """A model of the type with its default settings, four blocks deep and narrow. Raises ProbeError, ValueError."""
    kind = getattr(transformers, class_name)
    config = CONFIG_MAPPING[name]()
    for path, value in OVERRIDES.get(name, {}).items():
        owner: Any = config
        *parts, key = path.split(".")
        for part in parts:
            owner = getattr(owner, part)
        setattr(owner, key, value)
    config = shrunken(config)
    shorten(config)
    config = rebuilt(config)
    size = sum(p.numel() for p in build(kind, copy.deepcopy(config), meta=True).parameters())
    if size > MOST_PARAMETERS:
        raise ProbeError(f"the small model has {size / 1e6:.0f} million parameters")
    return build(kind, config)


def shorten(config: PretrainedConfig) -> None:
    """Let no stack have more than `DEPTH` blocks, in place, with the lists that have one entry a block."""
    values = vars(config)
    for key in _DEPTHS:
        total = values.get(key)
        if isinstance(total, int) and total > DEPTH:
            setattr(config, key, DEPTH)
            for name, value in list(values.items()):
                if isinstance(value, list | tuple) and len(value) == total:
                    setattr(config, name, type(value)(value[:DEPTH]))
                elif isinstance(value, dict) and name == "per_layer_config":
                    setattr(config, name, {k: v for k, v in value.items() if int(k) < DEPTH})
    for value in list(values.values()):
        if isinstance(value, PretrainedConfig):
            shorten(value)
