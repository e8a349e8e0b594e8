"""Adapters of PEFT beside a checkpoint whose weights they cannot be merged into."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from hf_shrink.errors import CheckpointError
from hf_shrink.runtime.linear import CompressedLinear

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

ADAPTER = "adapter"  # folder beside the weights
CONFIG = "adapter_config.json"


def has_adapter(folder: Path) -> bool:
    """Whether an adapter lies beside a checkpoint's weights."""
    return (folder / ADAPTER / CONFIG).is_file()


def known_to_peft(config: LoraConfig) -> LoraConfig:
    """The config, in which packed Linears are from now on among what PEFT can put adapters on.

        config = LoraConfig(target_modules=["q_proj", "v_proj"])
        adapted = get_peft_model(model, hf_shrink.known_to_peft(config))

    An adapter is stored without that, so put it on again with `load_adapter`. `target_modules="all-linear"` finds dense
    matrices only: name them.
    """
    from peft.tuners import lora

    config._register_custom_module({CompressedLinear: lora.Linear})
    return config


def load_adapter(
    model: PreTrainedModel, folder: str | os.PathLike[str], *, subfolder: str | None = None, trainable: bool = False
) -> PeftModel:
    """Put a saved adapter on a model, packed or not: PEFT's `from_pretrained`, which does not know packed Linears.

        model = AutoModelForCausalLM.from_pretrained("small")
        model = hf_shrink.load_adapter(model, "small/adapter")

    Args:
        folder: of the adapter, or its id on the Hub.
        subfolder: of that, where the adapter lies in one.
        trainable: to train it further.

    Raises:
        CheckpointError: there is no adapter for this model, or PEFT is not installed.
    """
    where = os.fspath(folder)
    inside: dict[str, Any] = {} if subfolder is None else {"subfolder": subfolder}
    try:
        from peft import LoraConfig, PeftModel

        config: Any = known_to_peft(LoraConfig.from_pretrained(where, **inside))
        found: PeftModel = PeftModel.from_pretrained(model, where, config=config, is_trainable=trainable, **inside)
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"adapters need {error.name}, which is not installed; run: pip install 'hf_shrink[training]'"
        ) from error
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{where} has no adapter for this model: {' '.join(str(error).split())}") from error
    return found
