"""What stock transformers can make of experts, tried on transformers 5.24.

Stock unpacks experts into their 3D parameters while it loads. It takes every matrix of every expert for packed, by the
first scheme whose targets say "experts", and reads no zero points: asymmetric experts and experts of two schemes come
out wrong without an error, dense ones stop it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightTransform

from hf_shrink.architectures import bind, known_families
from hf_shrink.architectures.bound import BoundBlock
from hf_shrink.plan import Scheme


def expert_matrices(model: PreTrainedModel) -> list[str]:
    """Paths of all matrices of all experts that a table of roles knows, in 3D parameters or taken apart."""
    return [path for block in _blocks(model) if block.experts is not None for path in block.experts.matrices]


def read_with_experts(model: PreTrainedModel, paths: Iterable[str]) -> list[str]:
    """Those of `paths` whose scheme stock reads as that of the experts, because of their names: shared experts too."""
    matrices = set(expert_matrices(model))
    return [path for path in paths if path in matrices or (matrices and "experts" in path)]


def router_paths(model: PreTrainedModel) -> list[str]:
    """Paths of the routers that a table of roles knows, Linears or not."""
    return [path for block in _blocks(model) for path in block.routers]


def _blocks(model: PreTrainedModel) -> list[BoundBlock]:
    """The blocks of a model whose table of roles knows experts; none of any other."""
    family = known_families().get(model.config.model_type)
    if family is None or not any(stack.experts for stack in family.stacks):
        return []
    return bind(model).blocks


def expert_reasons(model: PreTrainedModel, schemes: Mapping[str, Scheme]) -> list[str]:
    """Why stock cannot load the model's experts beside weights packed by `schemes`; empty when it can."""
    if not schemes:
        return []
    matrices = expert_matrices(model)
    dense = [path for path in matrices if path not in schemes]
    if not matrices:
        dense = _merged_parameters(model)
    if dense:
        return [
            f"{dense[0]} stays dense: beside packed weights stock reads a mixture only when all matrices of all of its "
            "experts are packed"
        ]
    found = {schemes[path] for path in [*matrices, *read_with_experts(model, schemes)]}
    reasons = []
    if len(found) > 1:
        reasons.append("experts of several schemes, of which stock reads one")
    if any(scheme.activation_bits < 16 for scheme in found):
        reasons.append("experts with int8 inputs, which stock neither unpacks nor rounds the inputs of")
    if any(not scheme.symmetric for scheme in found):
        reasons.append("asymmetric experts, whose zero points stock does not read")
    return reasons


def _merged_parameters(model: PreTrainedModel) -> list[str]:
    """Parameters that stock puts together from several weights of a checkpoint."""
    targets = [
        conversion.target_patterns[0].lstrip("^.")
        for conversion in get_model_conversion_mapping(model)
        if isinstance(conversion, WeightConverter) and all(s.endswith(".weight") for s in conversion.source_patterns)
    ]
    return [name for name, _ in model.named_parameters() if any(name.endswith(target) for target in targets)]


def without_merging(conversions: Sequence[WeightTransform], model: PreTrainedModel) -> list[WeightTransform]:
    """transformers' conversions of names without those that merge experts into 3D parameters."""
    specs = [block.experts.spec for block in bind(model).blocks if block.experts is not None]
    merged = {f"{spec.module.rpartition('.')[2]}.{name}" for spec in specs for name in (spec.fused, spec.down_fused)}
    return [
        c for c in conversions if not (isinstance(c, WeightConverter) and c.target_patterns[0].endswith((*merged,)))
    ]
