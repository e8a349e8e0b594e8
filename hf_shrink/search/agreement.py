"""What weights have to agree on so that stock transformers can load them."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel

from hf_shrink.architectures.linears import shape
from hf_shrink.checkpoint.portability import needs_dequantize, portability
from hf_shrink.errors import RecipeError
from hf_shrink.plan import Scheme


def one_scheme(
    model: nn.Module, schemes: Collection[Scheme], quantizable: Collection[str]
) -> tuple[Scheme, ...] | None:
    """The schemes of which all weights must get the same one, with a group size that fits all; None: bits may be mixed.

    Args:
        schemes: that weights may get.
        quantizable: paths of the weights.

    Raises:
        RecipeError: stock cannot load these weights in few bits at all.
    """
    if not schemes or not quantizable or not isinstance(model, PreTrainedModel):
        return None
    tried = dict.fromkeys(quantizable, next(iter(schemes)))
    if reasons := portability(model, tried, {}):
        raise RecipeError(
            f"not portable: {'; '.join(reasons)}. Set portable: false (--set portable=false): the result then loads "
            "after `import hf_shrink`"
        )
    if not any(needs_dequantize(model, dict.fromkeys(quantizable, scheme)) for scheme in schemes):
        return None
    return common(model, schemes, quantizable)


def common(model: nn.Module, schemes: Collection[Scheme], paths: Collection[str]) -> tuple[Scheme, ...]:
    """The schemes with a group size that divides the width of every matrix at `paths`."""
    width = math.gcd(*(shape(model.get_submodule(path))[1] for path in paths))
    sizes = {scheme: max(d for d in range(1, (scheme.group_size or 1) + 1) if width % d == 0) for scheme in schemes}
    return tuple(replace(s, group_size=sizes[s]) if s.group_size is not None else s for s in schemes)
