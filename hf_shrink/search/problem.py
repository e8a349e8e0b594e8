"""From what was measured to a Problem: the options of all groups, with exact costs and predicted damage."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hf_shrink.architectures.absent import PARTS
from hf_shrink.architectures.binding import Binding
from hf_shrink.architectures.bound import BoundAttention, BoundBlock, BoundMlp, BoundStack
from hf_shrink.architectures.linears import is_matrix, shape
from hf_shrink.plan import BlockPlan, Plan
from hf_shrink.pruning.items import stays
from hf_shrink.pruning.parts import Kind
from hf_shrink.pruning.prunable import Unitary, config_key
from hf_shrink.search.choices import Choice, Choices, named, short
from hf_shrink.search.costs import Costs
from hf_shrink.search.cuts import STEP, Cut, cuts_of, expert_cuts, prunable_units
from hf_shrink.search.latency import LatencyTable
from hf_shrink.search.measuring import Space
from hf_shrink.search.options import Change, Cost, Group, Option, Place, Problem
from hf_shrink.search.outer import outer_weights
from hf_shrink.search.pieces import EXPERTS, Piece, find_pieces
from hf_shrink.search.pruned import undominated
from hf_shrink.search.rehearsed import NEUTRAL, USUAL
from hf_shrink.search.sensitivity import Sensitivity
from hf_shrink.search.storage import Storage
from hf_shrink.surgery import cut_shapes
from hf_shrink.surgery.depth import layer_types, writes_cache


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

    Raises:
        RecipeError: what is asked cannot be loaded by stock transformers, and the space is to be portable.
        ArchitectureError: as of `find_pieces`; with `latency`, as of `model_seconds`.
    """
    costs = Costs(model, binding.blocks, Storage(model, dtype), latency)
    maker = _Maker(model, binding, space, sensitivity, costs, quantizable)
    groups = [group for stack in binding.stacks for block in stack.blocks for group in maker.block(stack, block)]
    groups += maker.outer() if space.embeddings and not space.portable else []
    groups = [undominated(group, NEUTRAL.of, USUAL.of) for group in groups]
    links: dict[tuple[str, int], list[Place]] = {}
    for number, group in enumerate(groups):
        for index, option in enumerate(group.options):
            if option.change.dropped and group.stack is not None and group.block is not None:
                links.setdefault((group.stack, group.block), []).append((number, index))
    return Problem(
        groups=tuple(groups),
        fixed=costs.fixed(),
        links=tuple(tuple(link) for link in links.values() if len(link) > 1),
        switches=maker.choices.switches,
        base=base,
        depths={stack.name: len(stack.blocks) for stack in binding.stacks},
        staying=frozenset((s.name, b.index) for s in binding.stacks for b in s.blocks if stays(s, b.index)),
    )


def dense_cost(model: nn.Module, binding: Binding, latency: LatencyTable | None = None) -> Cost:
    """What a model takes as it is. `latency`: of its own dtype; None: no seconds."""
    nothing = Space((), width=False, depth=False, embeddings=False)
    base = Plan(binding.model_type)
    return make_problem(model, binding, nothing, Sensitivity({}, {}, {}, {}), (), base, latency=latency).dense


@dataclass
class _Maker:
    model: nn.Module
    binding: Binding
    space: Space
    sensitivity: Sensitivity
    costs: Costs
    quantizable: Collection[str]

    def __post_init__(self) -> None:
        space = self.space
        self._prunable = None
        if space.width and self.sensitivity.curves:
            self._prunable = prunable_units(self.model, self.binding, portable=space.portable)
        self.choices = Choices(self.model, space.schemes, self.quantizable, portable=space.portable)
        sizes = [
            stored.group_size for _, stored in self.choices.all if stored is not None and stored.group_size is not None
        ]
        self._multiple = max([STEP, *(size for size in sizes if self.choices.must_agree or size <= 2 * STEP)])
        keys = [stack.spec and (stack.spec.config, stack.spec.depth) for stack in self.binding.stacks]
        self._fixed_depth = {
            stack.name
            for stack, key in zip(self.binding.stacks, keys, strict=True)
            if key is None or (space.portable and keys.count(key) > 1)
        }

    def block(self, stack: BoundStack, block: BoundBlock) -> Iterator[Group]:
        """The groups of one block."""
        only = replace(self.binding, stacks=(replace(stack, blocks=(block,)),))
        pieces = {piece.kind: piece for piece in find_pieces(only, self.quantizable)}
        made: list[tuple[str, list[Option]]] = []
        for kind in PARTS:
            part: BoundAttention | BoundMlp | None = getattr(block, kind)
            if part is not None:
                made.append((kind, list(self._part(stack, block, kind, part, pieces))))
        if block.experts is not None:
            made.append(("experts", list(self._of_experts(stack, block, pieces))))
        if "others" in pieces:
            made.append(("others", list(self._others(pieces["others"]))))
        if not made:
            return
        rest = self.costs.rest(block)
        drop = self.sensitivity.dropped.get((stack.name, block.index, None))
        goes = self.space.depth and stack.name not in self._fixed_depth and self._may_go(stack, block)
        for number, (what, options) in enumerate(made):
            if number == 0:
                options = [replace(option, cost=option.cost + rest) for option in options]
            if goes and drop is not None:
                options.append(Option("dropped", Cost(), drop if number == 0 else 0.0, Change(dropped=True)))
            yield Group(f"{block.path} {what}", tuple(options), stack.name, block.index)

    def outer(self) -> Iterator[Group]:
        """Embeddings and heads."""
        for paths in outer_weights(self.model):
            module = self.model.get_submodule(paths[0])
            assert isinstance(module.weight, Tensor)
            multiplied = any(is_matrix(self.model.get_submodule(path)) for path in paths)
            damages = self.sensitivity.outer.get(paths[0], {})
            options = []
            for asked, stored in self.choices.all:
                if asked is None or stored is None:
                    options.append(Option("dense", self.costs.outer(paths, None, multiplied=multiplied), 0.0))
                elif asked in damages:
                    own = stored.for_width(module.weight.shape[1])
                    cost = self.costs.outer(paths, own, multiplied=multiplied)
                    options.append(Option(short(own), cost, damages[asked], Change(dict.fromkeys(paths, own))))
            yield Group(" and ".join(paths), tuple(options))

    def _part(
        self,
        stack: BoundStack,
        block: BoundBlock,
        kind: Kind,
        part: BoundAttention | BoundMlp,
        pieces: Mapping[str, Piece],
    ) -> Iterator[Option]:
        allowed = self._prunable.kinds if self._prunable is not None else {}
        # Where all blocks must lose the very same heads, no group could decide that.
        tied = isinstance(part, BoundAttention) and part.spec.tied
        can_be_cut = (stack.name, kind) in allowed and not tied
        curves = self.sensitivity.curves.get((stack.name, block.index, kind)) if can_be_cut else None
        writes, reads = pieces.get(f"{kind} in"), pieces.get(f"{kind} out")
        cached = kind != "cross_attention" and writes_cache(self.model, stack)
        for cut in cuts_of(part, kind, curves, allowed.get((stack.name, kind)), self._multiple):
            size = self._switch_of_size(stack, part, cut) if curves is not None else ()
            cache = 0
            if cached and isinstance(part, BoundAttention):
                cache = self.costs.cache(part, int(cut.left.sum()), cut.kv_heads)
            yield from self._with_bits(block, part.modules, (writes, reads), cut, cache, size)
        gone = self.sensitivity.dropped.get((stack.name, block.index, kind))
        if gone is not None and self.space.depth and not self.space.portable and self._may_go(stack, block):
            change = Change({}, BlockPlan(removed=(kind,)))
            yield Option(f"without {kind.replace('_', ' ')}", self.costs.stand_in(part), gone, change)

    def _of_experts(self, stack: BoundStack, block: BoundBlock, pieces: Mapping[str, Piece]) -> Iterator[Option]:
        """All experts of a block: their channels, and bits for what writes these and for what reads them."""
        experts = block.experts
        assert experts is not None
        allowed = self._prunable is not None and (stack.name, "experts") in self._prunable.kinds
        curves = self.sensitivity.curves.get((stack.name, block.index, "experts")) if allowed else None
        modules = {path: self.model.get_submodule(path) for path in experts.matrices}
        writes, reads = (pieces.get(kind) for kind in EXPERTS)
        for cut in expert_cuts(experts, curves, self._multiple):
            size = self._switch_of_size(stack, experts, cut) if curves is not None else ()
            yield from self._with_bits(block, modules, (writes, reads), cut, 0, size)

    def _with_bits(
        self,
        block: BoundBlock,
        modules: Mapping[str, nn.Module],
        pieces: tuple[Piece | None, Piece | None],
        cut: Cut,
        cache: int,
        size: tuple[str, ...],
    ) -> Iterator[Option]:
        """A cut, with every scheme of what writes its units beside every one of what reads them.

        Args:
            cache: what a token takes of the KV cache.
            size: switches that the cut needs.
        """
        writes, reads = pieces
        sizes = {path: shape(module) for path, module in modules.items()} | cut_shapes(block, cut.plan)
        for first, second in itertools.product(self.choices.of(writes), self.choices.of(reads)):
            given = dict.fromkeys(writes.modules, first[1]) if writes is not None else {}
            given |= dict.fromkeys(reads.modules, second[1]) if reads is not None else {}
            schemes = {path: s.for_width(sizes[path][1]) for path, s in given.items() if s is not None}
            needs = self.choices.needs(modules, schemes)
            if needs is None:
                continue
            cost = self.costs.matrices(modules, sizes, schemes)
            rounding = self._rounding(writes, first[0], cut) | self._rounding(reads, second[0], cut)
            damage = cut.damage + sum(rounding.values())
            name = named(first[1] if writes is not None else second[1], second[1] if reads is not None else first[1])
            name = f"{name}, {cut.name}" if cut.name else name
            yield Option(name, replace(cost, cache=cache), damage, Change(schemes, cut.plan), (*size, *needs), rounding)

    def _others(self, piece: Piece) -> Iterator[Option]:
        """Matrices without a role."""
        sizes = {path: shape(module) for path, module in piece.modules.items()}
        for asked, stored in self.choices.of(piece):
            schemes = {} if stored is None else {path: stored.for_width(size[1]) for path, size in sizes.items()}
            needs = self.choices.needs(piece.modules, schemes)
            if needs is not None:
                damage = 0.0 if asked is None else self.sensitivity.rounding[piece.name].damage[asked]
                cost = self.costs.matrices(piece.modules, sizes, schemes)
                yield Option(short(stored), cost, damage, Change(schemes), needs, {piece.kind: damage})

    def _rounding(self, piece: Piece | None, scheme: Choice, cut: Cut) -> dict[str, float]:
        """Nats that a scheme costs a piece with some units left, by its kind; empty where it costs nothing."""
        if piece is None or scheme is None:
            return {}
        rounding = self.sensitivity.rounding[piece.name]
        left = cut.left.double().mean() if rounding.units is None else rounding.units[cut.left].sum()
        return {piece.kind: rounding.damage[scheme] * float(left)}

    def _switch_of_size(self, stack: BoundStack, part: Unitary, cut: Cut) -> tuple[str, ...]:
        """Of a part's size, where all blocks must have the same."""
        if not self.space.portable:
            return ()
        key = config_key(stack, part)  # not the stack's name: encoder and decoder may read the same place
        return self.choices.switch(key, f"{key}: {cut.name or 'all'}")

    def _may_go(self, stack: BoundStack, block: BoundBlock) -> bool:
        """Not the first block, nor the first of its kind where layers with windows have caches of their own."""
        kinds = layer_types(self.model, stack)
        return kinds.index(kinds[block.index]) != block.index
