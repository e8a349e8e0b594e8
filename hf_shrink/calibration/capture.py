"""What each block of a stack is called with, learnt by running the model's own forward with cheap stand-ins.

The model builds its own masks, position embeddings and the like, so nothing here knows any architecture. The first
batch runs for real and shows how blocks pass things on; for the others a block is replaced by a stand-in that hands its
input through, unless later blocks use more of its output than the hidden states (a shared position bias).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_shrink.architectures.reads import accepted_names
from hf_shrink.calibration.padding import fitted
from hf_shrink.calibration.routing import routed
from hf_shrink.errors import ArchitectureError, CalibrationError
from hf_shrink.residence import Room, States, residence_of


class _Stop(Exception):
    """Every block has been seen; the rest of the forward is not needed."""


@dataclass
class Call:
    """The arguments of one block for one batch, without the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Captured:
    """What `capture` found.

    Attributes:
        hidden: for each batch, the first block's input (batch, sequence, width).
        calls: [batch][block] arguments besides the hidden states.
        links: [block] {keyword: (earlier block, position in its output)} for tensors handed from block to block.
        masks: for each batch, bool (batch, sequence) of the real tokens, or None when nothing is padded.
        contexts: the same of what a decoder's cross attention reads; empty for stacks that are not such a decoder.
    """

    hidden: States = field(default_factory=States)
    calls: list[list[Call]] = field(default_factory=list)
    links: list[dict[str, tuple[int, int]]] = field(default_factory=list)
    masks: list[Tensor | None] = field(default_factory=list)
    contexts: list[Tensor | None] = field(default_factory=list)


def capture(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    batches: Sequence[Mapping[str, Any]],
    dtype: torch.dtype | None = None,
    room: Room | None = None,
) -> Captured:
    """Record the calls of `blocks` for every batch of model inputs.

    Args:
        dtype: of the hidden states; None: the model's.
        room: what they may take of memory; None: what the model's residence allows, or no limit.

    Raises:
        CalibrationError: no batches, or the model never reaches its blocks with this input.
        ArchitectureError: something outside the blocks changes the hidden states between two of them.
    """
    if not batches:
        raise CalibrationError("there is no calibration data")
    residence = residence_of(model)
    found = Captured(States(room) if residence is None else States(residence.room, residence.folder))
    probe = _Probe(blocks)
    _run(model, blocks, batches[0], probe.stand_in)
    probe.check()
    found.links = probe.links
    for batch in batches:
        calls: list[Call] = []

        def stand_in(index: int, real: Callable[..., Any], args: Any, kwargs: Any, calls: list[Call] = calls) -> Any:
            hidden, call = split_hidden(args, kwargs)
            if index == 0:
                found.hidden.append(hidden if dtype is None else hidden.to(dtype))
            calls.append(call)
            if index == len(blocks) - 1:
                raise _Stop
            return real(*args, **kwargs) if probe.hands_on[index] else probe.like_output[index](hidden)

        _run(model, blocks, batch, stand_in)
        if len(calls) != len(blocks):
            raise CalibrationError(f"the model ran {len(calls)} of its {len(blocks)} blocks on this calibration data")
        found.calls.append(calls)
        hidden = found.hidden[len(found.hidden) - 1]
        if _is_decoder(model, blocks):
            found.masks.append(_padding(model, batch.get("decoder_attention_mask"), hidden))
            found.contexts.append(_context(model, batch.get("attention_mask"), calls[0]))
        else:
            found.masks.append(_padding(model, batch.get("attention_mask"), hidden))
    if residence is not None:
        residence.glanced_outside()
    return found


def run_with_outputs(model: nn.Module, blocks: Sequence[nn.Module], batch: Mapping[str, Any], hidden: Tensor) -> None:
    """Run what comes before and after the blocks, with `hidden` in place of the last block's output."""

    def stand_in(index: int, real: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if index == 0 or outputs[-1] is None:
            outputs.append(real(*args, **kwargs))
        given, _ = split_hidden(args, kwargs)
        return _rebuild(outputs[-1])(hidden.to(given.dtype) if index == len(blocks) - 1 else given)

    outputs: list[Any] = [None]
    with torch.no_grad(), routed(dict(enumerate(blocks)), stand_in):
        model(**model_inputs(model, batch))


def split_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    """The hidden states (first argument, or the keyword `hidden_states`) apart from the rest."""
    if args:
        return args[0].detach(), Call(tuple(args[1:]), dict(kwargs))
    rest = dict(kwargs)
    return rest.pop("hidden_states").detach(), Call((), rest)


def first_output(output: Any) -> Tensor:
    """The hidden states that a block returns, alone or first in a tuple."""
    tensor: Tensor = output if isinstance(output, Tensor) else output[0]
    return tensor


class _Probe:
    """Watches one real forward: the form of every block's output, and which outputs later blocks receive."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self._blocks = blocks
        self._outputs: list[Any] = []
        self.links: list[dict[str, tuple[int, int]]] = []
        self.like_output: list[Callable[[Tensor], Any]] = []
        self.hands_on = [False] * len(blocks)

    def stand_in(self, index: int, real: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        hidden, call = split_hidden(args, kwargs)
        if self._outputs:
            before = first_output(self._outputs[-1])
            if before is not hidden and (
                before.shape != hidden.shape
                # NaN equals itself here: the walk finds it and names the place.
                or not torch.allclose(before.to(hidden.device), hidden, rtol=0, atol=0, equal_nan=True)
            ):
                raise ArchitectureError(
                    f"the hidden states change between block {index - 1} and block {index}, outside the blocks; "
                    "such a model can only be compressed by methods that need no calibration (method: rtn)"
                )
        self.links.append(self._links_of(call))
        output = real(*args, **kwargs)
        self._outputs.append(output)
        self.like_output.append(_rebuild(output))
        if index == len(self._blocks) - 1:
            raise _Stop
        return output

    def _links_of(self, call: Call) -> dict[str, tuple[int, int]]:
        links = {}
        named: list[tuple[Any, Any]] = [*call.kwargs.items(), *enumerate(call.args)]
        for key, value in named:
            if not isinstance(value, Tensor):
                continue
            for block, output in enumerate(self._outputs):
                for position, part in enumerate(output) if isinstance(output, tuple) else ():
                    if position and part is value:
                        links[key] = (block, position)
                        self.hands_on[block] = True
        return links

    def check(self) -> None:
        if len(self._outputs) != len(self._blocks):
            raise CalibrationError(
                f"the model ran {len(self._outputs)} of its {len(self._blocks)} blocks on this calibration data; "
                "does the data have the inputs that this model wants?"
            )
        self._outputs = []


def _rebuild(output: Any) -> Callable[[Tensor], Any]:
    """A function from hidden states to an output of the same form."""
    if isinstance(output, Tensor):
        return lambda hidden: hidden
    rest = tuple(None if isinstance(part, Tensor) else part for part in output[1:])
    return lambda hidden: (hidden, *rest)


def _run(model: nn.Module, blocks: Sequence[nn.Module], batch: Mapping[str, Any], stand_in: Callable[..., Any]) -> None:
    inputs = model_inputs(model, batch)
    with torch.no_grad(), routed(dict(enumerate(blocks)), stand_in):
        try:
            model(**inputs)
        except _Stop:
            return


def model_inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch on the model's device, in its float dtype, without a KV cache and without labels."""
    device = next(model.parameters()).device
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    inputs = {
        key: value.to(device, dtype if value.is_floating_point() else None) if isinstance(value, Tensor) else value
        for key, value in batch.items()
        if key != "labels"
    }
    if _takes_use_cache(model):
        inputs["use_cache"] = False
    return inputs


def _takes_use_cache(model: nn.Module) -> bool:
    """Whether `forward` has the argument, or hands what it does not know on to a part of the model that has it."""
    if "use_cache" in (accepted_names(model) or ()):
        return True
    parameters = inspect.signature(model.forward).parameters
    hands_on = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    inner = (part for part in model.modules() if isinstance(part, PreTrainedModel) and part is not model)
    return hands_on and any("use_cache" in inspect.signature(part.forward).parameters for part in inner)


def _is_decoder(model: nn.Module, blocks: Sequence[nn.Module]) -> bool:
    """Whether the blocks are the decoder of an encoder-decoder."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    return not any(module is blocks[0] for module in model.get_encoder().modules())  # type: ignore[operator]


def _padding(model: nn.Module, mask: Any, states: Tensor) -> Tensor | None:
    """The mask as bool (batch, sequence) of these states; None where it pads nothing, or is about something else."""
    if not isinstance(mask, Tensor) or mask.dim() != 2 or bool(mask.all()):
        return None
    found = fitted(mask, states.shape[:2], model)
    return None if found is None else found.to(states.device)


def _context(model: nn.Module, mask: Any, call: Call) -> Tensor | None:
    """The same of the encoder's states, which are among what a decoder's block is called with."""
    given = (v for v in (*call.args, *call.kwargs.values()) if isinstance(v, Tensor) and v.dim() == 3)
    return next((found for states in given if (found := _padding(model, mask, states)) is not None), None)
