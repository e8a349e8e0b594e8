"""What stock transformers can load, tried on transformers 5.24 and compressed-tensors 0.20.

Every row has a test in a process without hf_shrink (tests/checkpoint/test_stock_loading.py):

- symmetric schemes, mixed or not, W8A8 and FP8A16 among them, and asymmetric ones with one scale per tensor, on
  Linears: loaded packed;
- one scheme for everything, of any kind and on embeddings too: loaded when the block carries `"dequantize": true`,
  which turns the weights dense; models of which parts are called before the whole (an encoder by `generate`) too;
- experts of a mixture: all of them packed by one symmetric scheme (see checkpoint/experts.py);
- everything else is not portable.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_shrink.architectures.linears import has_usual_forward
from hf_shrink.architectures.probe import ProbeError, input_dimensions
from hf_shrink.checkpoint.exchanged import exchange_reasons
from hf_shrink.checkpoint.experts import expert_reasons
from hf_shrink.checkpoint.ties import can_untie
from hf_shrink.plan import Scheme
from hf_shrink.runtime import PackedModule
from hf_shrink.surgery import build_skeleton, is_uneven


def portability(
    model: PreTrainedModel, schemes: Mapping[str, Scheme], shapes: Mapping[str, Any] | None = None
) -> list[str]:
    """Why stock transformers cannot load the model stored with these schemes; empty when it can.

    Args:
        model: dense, or already compressed.
        schemes: by module path, of every weight that is stored packed.
        shapes: those that the stock config will not be able to say, by module path; None: what `config.hf_shrink`
            holds now.
    """
    reasons = []
    if is_uneven(model) if shapes is None else bool(shapes):
        reasons.append("blocks differ in shape in a way that the stock config cannot say")
    kinds = stock_kinds(model, schemes)
    transposed = [path for path, kind in kinds.items() if issubclass(kind, Conv1D)]
    if transposed:
        reasons.append(
            f"{_few(transposed)}: Conv1D, whose weight is stored transposed; compressed-tensors knows only Linear and "
            "Embedding"
        )
    other = [path for path, kind in kinds.items() if not issubclass(kind, nn.Linear | nn.Embedding | Conv1D)]
    if other:
        reasons.append(f"{_few(other)}: neither Linear nor Embedding, which is all that compressed-tensors knows")
    reasons += [*expert_reasons(model, schemes), *exchange_reasons(model, schemes)]
    rounded = [path for path, scheme in schemes.items() if scheme.activation_bits < 16]
    for what, paths in _dense_in_stock(model, schemes, kinds).items():
        if len(set(schemes.values())) > 1:
            reasons.append(f"{_few(paths)}: {what}, which stock loads only when all weights share one scheme")
        elif rounded:
            reasons.append(f"{_few(paths)}: {what}, which stock loads only dense, and then rounds no inputs to int8")
    return reasons


def needs_dequantize(model: PreTrainedModel, schemes: Mapping[str, Scheme]) -> bool:
    """Whether stock loads these schemes only with `"dequantize": true`."""
    return bool(_dense_in_stock(model, schemes, stock_kinds(model, schemes)))


def rounded_otherwise(model: PreTrainedModel, schemes: Mapping[str, Scheme]) -> list[str]:
    """Notes on inputs that stock rounds with other scales than this package, which takes one a token.

    compressed-tensors takes one for each place in an input's first two dimensions, so one alone for (tokens, width).
    What inputs look like is read off a narrow copy of the model; without one that runs nothing is said.
    """
    rounded = [path for path, scheme in schemes.items() if scheme.activation_bits < 16]
    if not rounded:
        return []
    try:
        dimensions = input_dimensions(model)
    except ProbeError:
        return []
    other = [path for path in rounded if dimensions.get(path, 3) != 3]
    if not other:
        return []
    return [
        f"{_few(other)}: stock transformers rounds these inputs with one scale for many tokens, because their shape "
        "is not (batch, tokens, width); with `import hf_shrink` each token gets its own, as it was measured here"
    ]


def stock_kinds(model: PreTrainedModel, paths: Iterable[str]) -> dict[str, type]:
    """The class that a stock model has at each path; a compressed module is looked up in a skeleton of the model."""
    modules = dict(model.named_modules())
    wanted = list(paths)
    if any(isinstance(modules[path], PackedModule) for path in wanted):
        modules = dict(build_skeleton(model).named_modules())
    return {path: type(modules[path]) for path in wanted}


def _dense_in_stock(
    model: PreTrainedModel, schemes: Mapping[str, Scheme], kinds: Mapping[str, type]
) -> dict[str, list[str]]:
    """The paths that stock can only turn into dense weights while loading, by what they are."""
    found = {
        "a quantized embedding": [path for path in schemes if issubclass(kinds[path], nn.Embedding)],
        "asymmetric": [p for p, scheme in schemes.items() if not scheme.symmetric and scheme.strategy != "tensor"],
        "packed apart from a weight that this config always ties": _forced_ties(model, schemes),
    }
    own = [p for p, kind in kinds.items() if issubclass(kind, nn.Linear) and not has_usual_forward(kind)]
    found["of a class that reads its weight in a forward of its own"] = own
    if _runs_in_parts(model):
        found["run by a part of the model before stock, at a forward of the whole, unpacks it"] = list(schemes)
    if not found["a quantized embedding"]:
        found["initialised by a code that asks for its weight"] = _initialised(model, schemes)
    return {what: paths for what, paths in found.items() if paths}


def _runs_in_parts(model: PreTrainedModel) -> bool:
    """Whether parts are called before the model itself: its encoder by `generate`, its towers by `get_..._features`.

    compressed-tensors unpacks all weights in a hook of the outermost forward, so that parts would run packed.
    """
    if not model.can_generate():
        return hasattr(model, "get_text_features")
    own_loop = getattr(type(model), "generate", None) is not GenerationMixin.generate
    return own_loop or bool(model.config.is_encoder_decoder)


def _forced_ties(model: PreTrainedModel, schemes: Mapping[str, Scheme]) -> list[str]:
    """Packed modules that the stock class ties to a dense one, with a config that cannot say otherwise (T5)."""
    if not getattr(model.config, "tie_word_embeddings", False) or can_untie(model.config):
        return []
    ties = {
        target.removesuffix(".weight"): source.removesuffix(".weight")
        for target, source in (type(model)._tied_weights_keys or {}).items()
    }
    return [target for target, source in ties.items() if (target in schemes) != (source in schemes)]


def _initialised(model: PreTrainedModel, schemes: Mapping[str, Scheme]) -> list[str]:
    """Packed modules whose `weight` an `_init_weights` asks for, of a module around them (T5) or called on them (CvT).

    Stock calls it on every module after loading, also where nothing is left to initialise, and fails where the weight
    is packed.
    """
    skeleton = build_skeleton(model)
    modules = dict(skeleton.named_modules())
    packed = [path for path, s in schemes.items() if s.packed and isinstance(modules.get(path), nn.Linear)]
    for path in packed:
        del modules[path].weight
    for tensor in (*skeleton.parameters(), *skeleton.buffers()):
        vars(tensor)["_is_hf_initialized"] = True  # as from_pretrained marks what it has loaded
    asked = []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for place in dict.fromkeys(place for path in packed for place in (*_parents(path), path)):
            try:
                _owner(modules, place)._init_weights(modules[place])
            except AttributeError:
                asked += [path for path in packed if place in (*_parents(path), path)]
    return list(dict.fromkeys(asked))


def _parents(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(len(parts))]


def _owner(modules: Mapping[str, nn.Module], path: str) -> Any:
    """The innermost model around a module, whose `_init_weights` is the one that is called on it."""
    around = [modules[parent] for parent in (*_parents(path), path)]
    return next(module for module in reversed(around) if isinstance(module, PreTrainedModel))


def _few(paths: Sequence[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
