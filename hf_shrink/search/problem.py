"""From what was measured to a Problem: the options of all groups, with exact costs and predicted damage."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_shrink.architectures.absent import PARTS
from hf_shrink.architectures.binding import Binding
from hf_shrink.architectures.bound import BoundAttention, BoundBlock, BoundMlp, BoundStack
from hf_shrink.architectures.linears import is_matrix, shape
from hf_shrink.plan import BlockPlan, Plan, Scheme
from hf_shrink.pruning.prunable import config_key, find_prunable
from hf_shrink.search.cuts import STEP, Cut, cuts_of
from hf_shrink.search.latency import LatencyTable, rest_of_blocks
from hf_shrink.search.measuring import Space, outer_weights
from hf_shrink.search.options import Change, Cost, Group, Option, Place, Problem
from hf_shrink.search.pieces import Piece, find_pieces
from hf_shrink.search.pruned import undominated
from hf_shrink.search.sensitivity import Sensitivity
from hf_shrink.search.storage import Storage
from hf_shrink.surgery import cut_shapes
from hf_shrink.surgery.depth import writes_cache

Choice = Scheme | None  # None: dense


def make_problem(
    model: nn.Module,
    binding: Binding,
    space: Space,
    sensitivity: Sensitivity,
    quantizable: Collection[str],
    base: Plan,
    *,
    dtype: torch.dtype | None = None,
    latency: LatencyTable | None = None,
) -> Problem:
    """All decisions. Takes no pass over data: a second budget asks the same Sensitivity.

    Args:
        model: dense; only shapes and names are looked at.
        space: of what was measured, or less: fewer schemes, without width, ...
        quantizable: as of `measure`.
        base: the plan around the decisions.
        dtype: what the model is cast to before anything is quantized; None: it stays.
        latency: of this device; None: options say nothing of seconds.
    """
    maker = _Maker(model, binding, space, sensitivity, Storage(model, dtype), latency)
    groups = [
        group for stack in binding.stacks for block in stack.blocks for group in maker.block(stack, block, quantizable)
    ]
    groups += maker.outer() if space.embeddings and not space.portable else []
    groups = [undominated(group) for group in groups]
    links: dict[tuple[str, int], list[Place]] = {}
    for number, group in enumerate(groups):
        for index, option in enumerate(group.options):
            if option.change.dropped and group.stack is not None and group.block is not None:
                links.setdefault((group.stack, group.block), []).append((number, index))
    return Problem(
        groups=tuple(groups),
        fixed=maker.fixed(),
        links=tuple(tuple(link) for link in links.values() if len(link) > 1),
        switches=tuple(tuple(sorted(names)) for names in maker.switches.values()),
        base=base,
        depths={stack.name: len(stack.blocks) for stack in binding.stacks},
    )


@dataclass
class _Maker:
    model: nn.Module
    binding: Binding
    space: Space
    sensitivity: Sensitivity
    storage: Storage
    latency: LatencyTable | None
    switches: dict[Hashable, set[str]] = field(default_factory=dict)
    counted: set[str] = field(default_factory=set)  # names of the tensors that some group pays for
    _matrices: dict[tuple[str, int, int, Choice], Cost] = field(default_factory=dict)

    def __post_init__(self) -> None:
        can_be_cut = self.space.width and bool(self.sensitivity.curves)
        self._prunable = (
            find_prunable(self.model, self.binding, "all", portable=self.space.portable) if can_be_cut else None
        )
        self._schemes: tuple[Choice, ...] = (None, *self.space.schemes)
        blocks = [block.module for block in self.binding.blocks]
        self._seconds_of_rest = {} if self.latency is None else rest_of_blocks(self.model, blocks, self.latency)
        keys = [stack.spec and (stack.spec.config, stack.spec.depth) for stack in self.binding.stacks]
        self._fixed_depth = {
            stack.name
            for stack, key in zip(self.binding.stacks, keys, strict=True)
            if key is None or (self.space.portable and keys.count(key) > 1)
        }

    def block(self, stack: BoundStack, block: BoundBlock, quantizable: Collection[str]) -> Iterator[Group]:
        """The groups of one block."""
        pieces = {piece.kind: piece for piece in find_pieces(_only(self.binding, stack, block), quantizable)}
        made: list[tuple[str, list[Option]]] = []
        for kind in PARTS:
            part: BoundAttention | BoundMlp | None = getattr(block, kind)
            if part is not None:
                made.append((kind, list(self._part(stack, block, kind, part, pieces))))
        if "others" in pieces:
            made.append(("others", list(self._others(pieces["others"]))))
        rest = self._rest(block)
        drop = self.sensitivity.dropped.get((stack.name, block.index, None))
        goes = self.space.depth and stack.name not in self._fixed_depth and self._may_go(stack, block)
        for number, (what, options) in enumerate(made):
            if number == 0:
                options = [replace(option, cost=option.cost + rest) for option in options]
            if goes and drop is not None:
                options.append(Option("dropped", Cost(), drop if number == 0 else 0.0, Change(dropped=True)))
            yield Group(f"{block.path} {what}", tuple(options), stack.name, block.index)
        if not made:
            self.counted -= self._names(block)

    def _part(
        self,
        stack: BoundStack,
        block: BoundBlock,
        kind: Any,
        part: BoundAttention | BoundMlp,
        pieces: Mapping[str, Piece],
    ) -> Iterator[Option]:
        allowed = self._prunable.kinds if self._prunable is not None else {}
        tied = (
            isinstance(part, BoundAttention) and part.spec.tied
        )  # all blocks lose the same heads: not a choice of one
        can_be_cut = (stack.name, kind) in allowed and not tied
        curves = self.sensitivity.curves.get((stack.name, block.index, kind)) if can_be_cut else None
        writes, reads = pieces.get(f"{kind} in"), pieces.get(f"{kind} out")
        cached = kind != "cross_attention" and writes_cache(self.model, stack)
        for cut in cuts_of(part, kind, curves, allowed.get((stack.name, kind)), self._multiple()):
            sizes = {path: shape(module) for path, module in part.modules.items()} | cut_shapes(block, cut.plan)
            needs = self._needs(stack, part, curves is not None, cut)
            cache = self._cache(part, cut) if cached else 0
            for first in self._schemes if writes is not None else (None,):
                for second in self._schemes if reads is not None else (None,):
                    given = dict.fromkeys(writes.modules, first) if writes is not None else {}
                    given |= dict.fromkeys(reads.modules, second) if reads is not None else {}
                    schemes = {p: s.for_width(sizes[p][1]) for p, s in given.items() if s is not None}
                    cost = sum(
                        (self._matrix(p, m, *sizes[p], schemes.get(p)) for p, m in part.modules.items()), start=Cost()
                    )
                    damage = cut.damage + self._rounding(writes, first, cut) + self._rounding(reads, second, cut)
                    yield Option(
                        _name(first, second, writes is not None and reads is not None, cut),
                        replace(cost, cache=cache),
                        damage,
                        Change(schemes, cut.plan),
                        needs,
                    )
        gone = self.sensitivity.dropped.get((stack.name, block.index, kind))
        if gone is not None and self.space.depth and not self.space.portable and self._may_go(stack, block):
            yield Option(
                f"without {kind.replace('_', ' ')}", self._stand_in(part), gone, Change({}, BlockPlan(removed=(kind,)))
            )

    def _others(self, piece: Piece) -> Iterator[Option]:
        for scheme in self._schemes:
            sizes = {path: shape(module) for path, module in piece.modules.items()}
            schemes = {p: scheme.for_width(sizes[p][1]) for p in sizes} if scheme is not None else {}
            cost = sum((self._matrix(p, m, *sizes[p], schemes.get(p)) for p, m in piece.modules.items()), start=Cost())
            damage = 0.0 if scheme is None else self.sensitivity.rounding[piece.name].damage[scheme]
            yield Option(_name(scheme, scheme, False, None), cost, damage, Change(schemes))

    def outer(self) -> Iterator[Group]:
        """Embeddings and heads."""
        for paths in outer_weights(self.model):
            damages = self.sensitivity.outer.get(paths[0], {})
            module = self.model.get_submodule(paths[0])
            weight = module.weight
            assert isinstance(weight, Tensor)
            heads = [path for path in paths if is_matrix(self.model.get_submodule(path))]
            options = []
            for scheme in self._schemes:
                if scheme is not None and scheme not in damages:
                    continue
                own = None if scheme is None else scheme.for_width(weight.shape[1])
                rows, columns = weight.shape
                cost = self._matrix(paths[0], module, rows, columns, own)
                if not heads:
                    cost = replace(cost, seconds={})  # a row is looked up
                damage = 0.0 if scheme is None else damages[scheme]
                change = Change({} if own is None else dict.fromkeys(paths, own))
                options.append(Option(_name(scheme, scheme, False, None), cost, damage, change))
            self.counted |= {f"{path}.{name}" for path in paths for name in ("weight", "bias")}
            yield Group(" and ".join(paths), tuple(options))

    def fixed(self) -> Cost:
        """Everything that no group pays for. Call it last."""
        seconds = {}
        head = self.model.get_output_embeddings() if isinstance(self.model, PreTrainedModel) else None
        if self.latency is not None and head is not None and f"{self._path(head)}.weight" not in self.counted:
            seconds = self.latency.matrix(*shape(head), None)
        kept = (name for name in self.storage.state if name not in self.counted)
        return Cost(self.storage.file + self.storage.dense(kept), 0, seconds)

    def _path(self, module: nn.Module) -> str:
        return str(next(path for path, other in self.model.named_modules() if other is module))

    def _rest(self, block: BoundBlock) -> Cost:
        """The block besides the matrices of its groups: norms and the like."""
        names = self._names(block)
        rest = Cost(self.storage.dense(names - self.counted), 0, self._seconds_of_rest)
        self.counted |= names
        return rest

    def _names(self, block: BoundBlock) -> set[str]:
        return {name for name in self.storage.state if name.startswith(block.path + ".")}

    def _matrix(self, path: str, module: nn.Module, rows: int, columns: int, scheme: Choice) -> Cost:
        """What a matrix of that size takes, its bias included."""
        key = path, rows, columns, scheme
        if key not in self._matrices:
            self.counted |= {f"{path}.weight", f"{path}.bias"}
            seconds = {} if self.latency is None else self.latency.matrix(rows, columns, scheme)
            self._matrices[key] = Cost(self.storage.matrix(path, module, rows, columns, scheme), 0, seconds)
        return self._matrices[key]

    def _stand_in(self, part: BoundAttention | BoundMlp) -> Cost:
        """What is left of a part that was taken out: one number, and the bias of its last matrix."""
        slot = part.slot("down" if isinstance(part, BoundMlp) else "output")
        names = {f"{slot.path}.bias"} & self.storage.state.keys()
        weight = part.modules[slot.path].weight
        assert isinstance(weight, Tensor)
        number = self.storage.tensor(f"{slot.path}.weight", self.storage.dtype_of(weight), (1,))
        return Cost(number + self.storage.dense(names))

    def _cache(self, part: BoundAttention | BoundMlp, cut: Cut) -> int:
        """Bytes of a token's key and value."""
        if isinstance(part, BoundMlp):
            return 0
        weight = next(iter(part.modules.values())).weight
        assert isinstance(weight, Tensor)
        return 2 * cut.kv_heads * part.head_size * self.storage.dtype_of(weight).itemsize

    def _rounding(self, piece: Piece | None, scheme: Choice, cut: Cut) -> float:
        """Nats that a scheme costs a piece with some units left."""
        if piece is None or scheme is None:
            return 0.0
        rounding = self.sensitivity.rounding[piece.name]
        left = 1.0 if rounding.units is None else float(rounding.units[cut.left].sum())
        return rounding.damage[scheme] * left

    def _needs(self, stack: BoundStack, part: BoundAttention | BoundMlp, can_be_cut: bool, cut: Cut) -> tuple[str, ...]:
        """The switch of a part's size where all blocks must have the same."""
        if not (self.space.portable and can_be_cut):
            return ()
        key = config_key(stack, part)
        size = cut.name or "all"
        name = f"{stack.name} {'mlp' if isinstance(part, BoundMlp) else 'attention'}: {size}"
        self.switches.setdefault(key, set()).add(name)
        return (name,)

    def _multiple(self) -> int:
        """Of channels, so that groups of columns stay whole."""
        sizes = {scheme.group_size for scheme in self.space.schemes if scheme.group_size is not None}
        return max([STEP, *(size for size in sizes if size <= 2 * STEP)])

    def _may_go(self, stack: BoundStack, block: BoundBlock) -> bool:
        """Not the first block, nor the first of its kind where layers with windows have caches of their own."""
        types: Any = getattr(self.model.config, "layer_types", None)
        known = isinstance(types, list | tuple) and len(types) == len(stack.blocks)
        kinds: list[Any] = list(types) if known else [None] * len(stack.blocks)
        return kinds.index(kinds[block.index]) != block.index


def _only(binding: Binding, stack: BoundStack, block: BoundBlock) -> Binding:
    return replace(binding, stacks=(replace(stack, blocks=(block,)),))


def _name(first: Choice, second: Choice, both: bool, cut: Cut | None) -> str:
    words = [_short(first) if first == second or not both else f"{_short(first)} in, {_short(second)} out"]
    if first is None and not both:
        words = [_short(second)]
    if cut is not None and cut.name:
        words.append(cut.name)
    return ", ".join(words)


def _short(scheme: Choice) -> str:
    if scheme is None:
        return "dense"
    size = f" g{scheme.group_size}" if scheme.group_size else f" per {scheme.strategy}"
    return f"W{scheme.bits}{size}{'' if scheme.symmetric else ' asymmetric'}"
