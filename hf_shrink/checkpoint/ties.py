"""Tied weights once one of the two is packed.

transformers ties parameters called `weight`; packed modules have none. Where embedding and head are packed as one, the
modules share what they hold; where one is stored on its own, the tie is taken out of model and config.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_shrink.runtime import PackedModule
from hf_shrink.runtime.packed import CHECKPOINT_BUFFERS as BUFFERS
from hf_shrink.runtime.sharing import share

Pair = tuple[str, str]  # module paths: target (the head), source (the embedding)


def settle_ties(model: PreTrainedModel) -> None:
    """Make the model's ties true again after modules were packed, in place. Does nothing the second time.

    Both packed to the same values: the target shares the source's buffers. Otherwise, and one of them packed: the tie
    is gone and `tie_word_embeddings` is false.
    """
    for pair in _parted_pairs(model):
        _untie(model, pair)
    for pair in _packed_pairs(model):
        target, source = _modules(model, pair)
        if _same_weight(target, source):
            tie_modules(model, pair)
        else:
            _untie(model, pair)


def hold_ties(model: PreTrainedModel) -> list[Pair]:
    """For a skeleton before its weights are loaded: the pairs to hand to `tie_modules` afterwards.

    Their targets have no buffers meanwhile, so that nothing is missing from the checkpoint. Pairs of which only one
    is packed, or differently, are untied.
    """
    held = []
    for pair in _packed_pairs(model):
        target, source = _modules(model, pair)
        if getattr(target, "scheme", None) != getattr(source, "scheme", None):
            _untie(model, pair)
            continue
        for name in packed_buffers(target):
            setattr(target, name, None)
        model.all_tied_weights_keys.pop(f"{pair[0]}.weight", None)
        held.append(pair)
    return held


def tie_modules(model: PreTrainedModel, pair: Pair) -> None:
    """Let the target hold the source's packed weight from now on, and take the tie out of transformers' tables.

    These are for parameters: the modules themselves know what they share (`PackedModule.sharing`).
    """
    target, source = _modules(model, pair)
    assert isinstance(target, PackedModule) and isinstance(source, PackedModule)
    others = [module for module in source.sharing if module not in (source, target)]
    share(source, *others, target)
    model.all_tied_weights_keys.pop(f"{pair[0]}.weight", None)
    for _ in _owners(model, pair):
        pass


def tied_modules(model: PreTrainedModel) -> list[Pair]:
    """The pairs of packed modules of this model that share a weight."""
    paths = {module: path for path, module in model.named_modules() if isinstance(module, PackedModule)}
    return [
        (path, paths[module.sharing[0]])
        for module, path in paths.items()
        if module.sharing and module.sharing[0] in paths and module.sharing[0] is not module
    ]


def tie_weights(model: PreTrainedModel, pairs: Iterable[Pair]) -> None:
    """The inverse of `tie_modules` once the modules are dense again: tie their weights."""
    for target, source in pairs:
        model.all_tied_weights_keys[f"{target}.weight"] = f"{source}.weight"
        for path, owner in model.named_modules():
            name = f"{target}.weight".removeprefix(f"{path}." if path else "")
            declared = type(owner)._tied_weights_keys if isinstance(owner, PreTrainedModel) else None
            if declared and name in declared:
                owner._tied_weights_keys = {**(owner._tied_weights_keys or {}), name: declared[name]}
    model.tie_weights(recompute_mapping=False)


def packed_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that hold a packed weight."""
    return {name: buffer for name, buffer in module.named_buffers(recurse=False) if name in BUFFERS}


def can_untie(config: PreTrainedConfig) -> bool:
    """Whether a reloaded config keeps `tie_word_embeddings: false` (T5's is always true)."""
    changed = copy.deepcopy(config)
    _say_untied(changed)
    return not type(config).from_dict(changed.to_dict()).tie_word_embeddings


def saved_state(model: PreTrainedModel, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors to write: a packed pair once, and what stock will not tie again as a tensor of its own."""
    state = dict(model.state_dict() if state is None else state)
    ties = model.get_expanded_tied_weights_keys(all_submodels=True)
    for target, source in tied_modules(model):
        for name in BUFFERS:
            if f"{source}.{name}" in state:
                state.pop(f"{target}.{name}", None)
    seen: dict[tuple[int, ...], str] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.device.type == "meta" or name in ties:
            continue
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), *tensor.shape)
        if seen.setdefault(place, name) != name:
            state[name] = tensor.clone()
    names = {own: stored for stored, own in stored_names(model).items()}
    return {names.get(name, name): tensor for name, tensor in state.items()}


def stored_names(model: nn.Module) -> dict[str, str]:
    """A tensor's name in a checkpoint to its name in the model's state dict, of packed modules where they differ."""
    return {
        f"{path}.{stored}": f"{path}.{own}"
        for path, module in model.named_modules()
        if isinstance(module, PackedModule)
        for own, stored in module.checkpoint_names.items()
    }


def _weight_pairs(model: PreTrainedModel) -> list[Pair]:
    """The pairs whose `weight` the model or its config still counts as tied. Biases can be tied too (BERT's head).

    Where a checkpoint stores two weights of a pair that differ, transformers takes it out of the model's table, and the
    config still says that it is tied.
    """
    said = model.get_expanded_tied_weights_keys(all_submodels=True)
    return [
        (target.removesuffix(".weight"), source.removesuffix(".weight"))
        for target, source in {**said, **model.all_tied_weights_keys}.items()
        if target.endswith(".weight") and source.endswith(".weight")
    ]


def _packed_pairs(model: PreTrainedModel) -> list[Pair]:
    """Of the pairs that count as tied, those of which at least one is packed."""
    pairs = _weight_pairs(model)
    return [pair for pair in pairs if any(isinstance(module, PackedModule) for module in _modules(model, pair))]


def _parted_pairs(model: PreTrainedModel) -> list[Pair]:
    """Dense pairs that still count as tied, and that have a weight each."""
    found = []
    for pair in _weight_pairs(model):
        weights = [getattr(module, "weight", None) for module in _modules(model, pair)]
        if all(isinstance(weight, nn.Parameter) for weight in weights) and weights[0] is not weights[1]:
            found.append(pair)
    return found


def _modules(model: PreTrainedModel, pair: Pair) -> tuple[nn.Module, nn.Module]:
    return model.get_submodule(pair[0]), model.get_submodule(pair[1])


def _same_weight(target: nn.Module, source: nn.Module) -> bool:
    one, other = packed_buffers(target), packed_buffers(source)
    return (
        bool(one)
        and one.keys() == other.keys()
        and target.scheme == source.scheme
        and all(buffer is other[name] or torch.equal(buffer, other[name]) for name, buffer in one.items())
    )


def _untie(model: PreTrainedModel, pair: Pair) -> None:
    model.all_tied_weights_keys.pop(f"{pair[0]}.weight", None)
    for owner, _ in _owners(model, pair):
        if can_untie(owner.config):
            _say_untied(owner.config)
    if can_untie(model.config):
        _say_untied(model.config)


def _say_untied(config: PreTrainedConfig) -> None:
    """Also in the part for text: configs of several parts take the word from there when they are read."""
    config.tie_word_embeddings = False
    text = config.get_text_config(decoder=True)
    if getattr(text, "tie_word_embeddings", False):
        text.tie_word_embeddings = False


def _owners(model: PreTrainedModel, pair: Pair) -> Iterator[tuple[PreTrainedModel, str]]:
    """The (sub)models whose class declares this tie, with their path prefix; the tie is taken from the instance's own
    copy of the table, so that the class keeps its."""
    for path, module in model.named_modules():
        if not isinstance(module, PreTrainedModel) or not module._tied_weights_keys:
            continue
        prefix = f"{path}." if path else ""
        if f"{pair[0]}.weight".removeprefix(prefix) in module._tied_weights_keys:
            module._tied_weights_keys = dict(module._tied_weights_keys)
            del module._tied_weights_keys[f"{pair[0]}.weight".removeprefix(prefix)]
            yield module, prefix
