"""The `quantization_config` block of config.json, built from compressed-tensors' own classes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus
from torch import nn
from transformers import PreTrainedModel

from hf_shrink.checkpoint.experts import router_paths
from hf_shrink.checkpoint.packed import format_of, group_of
from hf_shrink.checkpoint.portability import needs_dequantize, portability
from hf_shrink.checkpoint.targets import stored_names, targets_by_group
from hf_shrink.errors import CheckpointError
from hf_shrink.plan import Scheme
from hf_shrink.surgery.sizes import RECORD_FORMAT

PRUNED_METHOD = "hf_shrink"
# The status of a block that is not portable. Stock would skip what it does not know with a warning and leave random
# weights; a status that it does not know it refuses, with this text in the message (which shows 50 characters).
NEEDS_HF_SHRINK = "run `import hf_shrink` before loading this"
OWN_KEY = "hf_shrink"  # in the block: it is ours; stock passes over keys that it does not know


def quantization_config(model: PreTrainedModel, schemes: Mapping[str, Scheme]) -> dict[str, Any]:
    """The block for a model whose modules at the paths of `schemes` are (or will be) stored packed.

    One config group per distinct scheme, in the order of the model's modules. Every Linear and router that stays as it
    is is listed in `ignore`, which vLLM asks for.

    Raises:
        CheckpointError: a path that the model does not have, or paths that no regex tells apart.
    """
    modules = dict(model.named_modules())
    unknown = [path for path in schemes if path not in modules]
    if unknown:
        raise CheckpointError(f"the model has no module {unknown[0]!r} to store packed; check the plan's schemes")
    by_scheme: dict[Scheme, list[str]] = {}
    for path in modules:
        if path in schemes:
            by_scheme.setdefault(schemes[path], []).append(path)
    kept = [path for path, module in modules.items() if isinstance(module, nn.Linear) and path not in schemes]
    plain = [path for path in kept if "." not in path]  # written as everybody writes lm_head
    inner = [path for path in kept if "." in path] + [path for path in router_paths(model) if path not in kept]
    others = [path for path in modules if path not in schemes and path not in set(inner)]
    *targets, ignored = targets_by_group(
        [*by_scheme.values(), inner], others, model.base_model_prefix, stored_names(model, schemes)
    )
    formats = {format_of(scheme) for scheme in by_scheme}
    config = QuantizationConfig(
        config_groups={f"group_{index}": group_of(scheme, targets[index]) for index, scheme in enumerate(by_scheme)},
        format=(formats.pop() if len(formats) == 1 else CompressionFormat.mixed_precision).value,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=plain + ignored,
    )
    block: dict[str, Any] = {**json.loads(config.model_dump_json()), OWN_KEY: RECORD_FORMAT}
    if portability(model, schemes):
        block["quantization_status"] = NEEDS_HF_SHRINK
    elif needs_dequantize(model, schemes):
        block["dequantize"] = True
    return block
