"""Where the weights of a model are while it is worked on: in files, and of those in memory only what is at work."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_shrink.residence.files import map_tensors, write_tensors
from hf_shrink.residence.pages import can_tell, is_own, let_go
from hf_shrink.residence.room import Room
from hf_shrink.residence.trim import give_back_large, release_free_memory
from hf_shrink.residence.visiting import Visits

ATTRIBUTE = "_hf_shrink_residence"
NAME = "_hf_shrink_block"  # of a block: its path when its model was attached, and itself: copies are not meant
OUTSIDE = "outside"  # the name of what lies in no block


class Residence:
    """Keeps one block of a model in memory at a time, whatever runs or reads the model.

    Tensors that lie in mapped files (the source's, or one that was written here) are let go of when the next block is
    entered. Those that were changed or made since are written to a file by `rest`, one for each block, and read from
    there afterwards. A tensor object stays the same; only the memory behind it changes.

    Attributes:
        folder: for files of a run, which nobody needs when it is over.
        room: for activations.

    Args:
        max_memory: bytes of activations, and of weights where they all fit in half of it, that may stay in memory.
        weights: bytes of the source's.
    """

    def __init__(self, folder: Path, max_memory: int, weights: int) -> None:
        self.folder = folder
        self.room = Room(max_memory)
        self.max_memory = max_memory
        self.weigh(weights)
        self._blocks: list[weakref.ref[nn.Module]] = []
        self._source: dict[str, list[Tensor]] = {}  # what a block was when it came, which it may hold no more
        self._parts: dict[str, dict[str, int]] = {}  # tensors in a file of ours, and where in memory that is
        self._current: weakref.ref[nn.Module] | None = None
        self._visits: Visits | None = None  # of its blocks to an accelerator that the rest is on
        self._model: weakref.ref[nn.Module] | None = None
        self._count = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Residence:
        return self

    def weigh(self, weights: int) -> None:
        """The source's weights have so many bytes."""
        self.weights = weights
        self._rests = can_tell() and weights > self.max_memory // 2
        if self._rests:
            give_back_large()
        self.room.limit = self.max_memory if self._rests else self.max_memory - weights

    @property
    def rests(self) -> bool:
        """Whether blocks come and go at all: not where all of them fit."""
        return self._rests or self._visits is not None

    @property
    def visited(self) -> bool:
        """Whether blocks come to an accelerator one at a time."""
        return self._visits is not None

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks of the model that are still there."""
        return [block for reference in self._blocks if (block := reference()) is not None]

    def attach(self, model: nn.Module, blocks: Mapping[str, nn.Module]) -> None:
        """Look after `model`, whose `blocks`, by path, come and go."""
        residence = self

        def entered(block: nn.Module, _: object) -> None:
            residence._enter(block)

        self._model = weakref.ref(model)
        vars(model)[ATTRIBUTE] = self
        for name, block in blocks.items():
            vars(block)[ATTRIBUTE] = self
            vars(block)[NAME] = name, weakref.ref(block)
            self._blocks.append(weakref.ref(block))
            self._source[name] = [tensor.data for tensor in tensors_of(block).values() if not is_own(tensor)]
            block.register_forward_pre_hook(entered)

    def name_of(self, block: nn.Module) -> str | None:
        """The path that the block had when the model was attached; None for others, copies among them."""
        name, itself = vars(block).get(NAME, ("", lambda: None))
        return name if itself() is block else None

    def move(self, device: torch.device) -> None:
        """Put all of the model on an accelerator, for good: nothing comes and goes any more."""
        model = None if self._model is None else self._model()
        assert model is not None
        model.to(device)
        self._rests = False
        self._source.clear()
        release_free_memory()

    def visit(self, device: torch.device) -> None:
        """Put on an accelerator what lies in no block; a block comes there when it runs, and leaves for the next."""
        model = None if self._model is None else self._model()
        assert model is not None
        inside = {id(module) for block in self.blocks for module in block.modules()}
        for module in model.modules():
            if id(module) not in inside:
                module._apply(lambda tensor: tensor.to(device), recurse=False)  # type: ignore[no-untyped-call]
        self._visits = Visits(device, tensors_of, self.glanced_at)
        for block in self.blocks:
            self._visits.invite(block)

    def needed_to_visit(self) -> int:
        """Bytes that an accelerator must have for `visit`: what is in no block, and two blocks with a copy of each."""
        model = None if self._model is None else self._model()
        assert model is not None
        largest = max(sum(tensor.nbytes for tensor in tensors_of(block).values()) for block in self.blocks)
        return sum(tensor.nbytes for tensor in self._outside(model).values()) + 4 * largest

    def staying(self, block: nn.Module) -> AbstractContextManager[None]:
        """Have a block where it would run, whatever other block runs meanwhile."""
        if self._visits is None or self.name_of(block) is None:
            return nullcontext()
        return self._visits.staying(block)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Let everything stay in memory that comes there."""
        before, self._rests = self._rests, False
        try:
            yield
        finally:
            self._rests = before

    def glanced_at(self, tensor: Tensor) -> None:
        """A tensor of the model was read once, out of turn."""
        if self._rests and not is_own(tensor):
            let_go(tensor)

    def glanced_outside(self) -> None:
        """What lies in no block has run, and will not for a while."""
        model = None if self._model is None else self._model()
        if self._rests and model is not None:
            for tensor in self._outside(model).values():
                self.glanced_at(tensor)

    def settled(self, tensor: Tensor) -> Tensor:
        """A tensor that was just made, from a file of ours."""
        if not self._rests or not tensor.nbytes or not is_own(tensor):
            return tensor
        self._count += 1
        path = self.folder / f"made-{self._count}.safetensors"
        write_tensors(path, {"": tensor})
        return map_tensors(path)[""]

    def rest(self, block: nn.Module) -> None:
        """Nobody needs the block's tensors in memory for a while, or holds the memory that they are in."""
        name = self.name_of(block)
        if self._visits is not None:
            self._visits.send_back(block)
        if self._rests and name is not None:
            self._rest(name, tensors_of(block))

    def rest_all(self) -> None:
        """The same for all blocks, and for what lies in none."""
        for block in self.blocks:
            self.rest(block)
        model = None if self._model is None else self._model()
        if self._rests and model is not None and self._visits is None:
            self._rest(OUTSIDE, self._outside(model))

    def finish(self, name: str, module: nn.Module, path: Path) -> None:
        """Write what is not the source's, of a block or (`OUTSIDE`) of a model, to `path`; it is read from there."""
        if self._visits is not None:
            self._visits.send_back(module)
        tensors = self._outside(module) if name == OUTSIDE else tensors_of(module)
        self._write(name, tensors, self._ours(name, tensors), path)
        if self._rests:
            self._let_go(name, tensors)

    def adopt(self, name: str, module: nn.Module, path: Path) -> None:
        """Take what `finish` wrote, in this process or another."""
        if self._visits is not None:
            self._visits.send_back(module)
        tensors = self._outside(module) if name == OUTSIDE else tensors_of(module)
        self._read(name, tensors, path)

    def _enter(self, block: nn.Module) -> None:
        if not self._rests or self.name_of(block) is None:
            return
        before = None if self._current is None else self._current()
        if before is not None and before is not block:
            # Only what a file stands behind: whoever changes a tensor for a while may hold the memory that it is in.
            for tensor in tensors_of(before).values():
                self.glanced_at(tensor)
        self._current = weakref.ref(block)

    def _rest(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        if any(is_own(tensor) for tensor in tensors.values()):
            self._count += 1
            path = self.folder / f"{name}-{self._count}.safetensors"
            self._write(name, tensors, self._ours(name, tensors), path)
        self._let_go(name, tensors)

    def _let_go(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Of what was written, of what is the source's, and of what of that was replaced."""
        if can_tell():
            for tensor in (*tensors.values(), *self._source.get(name, ())):
                let_go(tensor)
            release_free_memory()

    def _ours(self, name: str, tensors: Mapping[str, Tensor]) -> list[str]:
        """The names of those that are no longer what the source has."""
        known = self._parts.get(name, {})
        return [n for n, tensor in tensors.items() if known.get(n) == tensor.data_ptr() or is_own(tensor)]

    def _write(self, name: str, tensors: Mapping[str, Tensor], names: list[str], path: Path) -> None:
        chosen = {n: tensors[n] for n in names}
        write_tensors(path, chosen)
        self._read(name, {n: tensor for n, tensor in chosen.items() if tensor.device.type == "cpu"}, path)
        for old_file in self.folder.glob(f"{name}-*.safetensors"):
            if old_file != path:
                old_file.unlink()

    def _read(self, name: str, tensors: Mapping[str, Tensor], path: Path) -> None:
        """Those of `tensors` that the file has are read from there."""
        found = {n: tensor for n, tensor in map_tensors(path).items() if n in tensors}
        for n, tensor in found.items():
            # Of a view, what it is a view of stays: see `PackedModule._fill`.
            tensors[n].data = tensor.to(tensors[n].device)
        self._parts[name] = {n: tensor.data_ptr() for n, tensor in found.items()}

    def _outside(self, model: nn.Module) -> dict[str, Tensor]:
        inside = {
            id(tensor)
            for module in model.modules()
            if self.name_of(module) is not None
            for tensor in tensors_of(module).values()
        }
        return {n: tensor for n, tensor in tensors_of(model).items() if id(tensor) not in inside}


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that have values, by name, each object once."""
    found = (*module.named_parameters(), *module.named_buffers())
    return {name: tensor for name, tensor in found if not tensor.is_meta}
