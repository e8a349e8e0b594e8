"""Put quantizers beside the weights of a model that will be packed, and pack these in the end."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn
from transformers import PreTrainedModel

from hf_shrink.checkpoint.ties import settle_ties
from hf_shrink.ops.quantized import QuantizedWeight
from hf_shrink.pipeline.packing import put_packed, tied_partner_missing, untie
from hf_shrink.scheme import Scheme
from hf_shrink.training.qat.forward import attach, detach, quantizer_of, rows_of
from hf_shrink.training.qat.quantizer import WeightQuantizer


def place_quantizers(
    model: PreTrainedModel, schemes: Mapping[str, Scheme], losing: Collection[str] = ()
) -> dict[str, WeightQuantizer]:
    """Attach a quantizer to every weight, in place; returns them by the path of the first module that has the weight.

    Modules that share a weight share its quantizer. A weight of which only one of the modules that share it is to be
    packed becomes that module's own first.

    Args:
        losing: paths of matrices that may lose inputs.
    """
    untie(model, tied_partner_missing(model, schemes))
    settle_ties(model)
    of_weight: dict[int, WeightQuantizer] = {}
    placed = {}
    for path, scheme in schemes.items():
        module = model.get_submodule(path)
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        first = id(weight) not in of_weight
        if first:
            rows, columns = rows_of(module).shape
            loses = path in losing
            quantizer = WeightQuantizer(scheme, rows, columns, weight.dtype, weight.device, loses_inputs=loses)
            of_weight[id(weight)] = placed[path] = quantizer
        attach(module, of_weight[id(weight)], path, owner=first)
    return placed


def pack_trained(model: PreTrainedModel, schemes: Mapping[str, Scheme], *, sparse: bool) -> None:
    """Put packed modules with the weights as they were trained into the places of those with quantizers.

    Args:
        sparse: weights that have zeros were pruned, and keep these.
    """
    trained: dict[int, tuple[nn.Module, QuantizedWeight]] = {}
    for path in schemes:
        module = model.get_submodule(path)
        if id(module.weight) not in trained:
            rows = rows_of(module)
            zeros = sparse and bool((rows == 0).any())
            trained[id(module.weight)] = module, quantizer_of(module).quantized(rows, sparse=zeros)
    for path in schemes:
        detach(model.get_submodule(path))
    for module, weight in trained.values():
        put_packed(model, module, weight)
