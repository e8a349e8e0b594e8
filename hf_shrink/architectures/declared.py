"""Bind one declared stack on a model: resolve its paths, count its units, and check that nothing is left over."""

from __future__ import annotations

import torch
from torch import nn

from hf_shrink.architectures.absent import is_absent
from hf_shrink.architectures.base import Attention, Mlp, Stack
from hf_shrink.architectures.bound import BoundAttention, BoundBlock, BoundMlp, BoundStack, Slot
from hf_shrink.architectures.experts import bind_experts, routers_of
from hf_shrink.architectures.linears import is_matrix, shape
from hf_shrink.errors import ArchitectureError


def bind_stack(model: nn.Module, spec: Stack) -> BoundStack | None:
    """None when the model has no such stack (for example the text half of a two-tower model)."""
    matches = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and (name == spec.blocks or name.endswith("." + spec.blocks))
    ]
    if not matches:
        return None
    path, blocks = min(matches, key=lambda match: len(match[0]))
    bound = tuple(_bind_block(spec, f"{path}.{i}", i, block) for i, block in enumerate(blocks))
    return BoundStack(spec.name, path, bound, spec)


def _bind_block(spec: Stack, path: str, index: int, block: nn.Module) -> BoundBlock:
    has_own = spec.attention is not None and (not spec.found or _has_matrices(block, spec.attention))
    attention = _bind_attention(spec.attention, path, block) if spec.attention and has_own else None
    has_cross = spec.cross_attention is not None and _has(block, spec.cross_attention.module)
    cross = _bind_attention(spec.cross_attention, path, block) if spec.cross_attention and has_cross else None
    experts = bind_experts(spec.experts, path, block) if spec.experts else None
    form = _mlp_form(spec.mlp, block, needed=experts is None and not spec.found) if spec.mlp else None
    mlp = _bind_mlp(form, path, block) if form else None
    routers = routers_of(spec.experts, path, block) if spec.experts else ()
    roles: dict[str, list[str]] = {}
    for part in (part for part in (attention, cross, mlp) if part is not None):
        for slot in part.slots:
            roles.setdefault(slot.path, []).append(slot.role)
    if experts is not None and experts.separate:
        roles.update({matrix: [role] for matrix, role in experts.matrices.items()})
    roles.update({router: ["router"] for router in routers if is_matrix(block.get_submodule(router[len(path) + 1 :]))})
    for name, module in block.named_modules():
        full = f"{path}.{name}"
        if is_matrix(module) and full not in roles:
            if name not in spec.ignored and not spec.found:
                raise ArchitectureError(f"{full} has no role in the table of {spec.name} blocks and is not ignored")
            roles[full] = []
    return BoundBlock(
        path, index, block, attention, cross, mlp, {k: tuple(v) for k, v in roles.items()}, experts, routers
    )


def _submodule(block: nn.Module, path: str, relative: str, role: str) -> nn.Module:
    try:
        return block.get_submodule(relative)
    except AttributeError as error:
        raise ArchitectureError(f"the role {role!r} is missing: {path} has no module {relative!r}") from error


def _bind_attention(spec: Attention, path: str, block: nn.Module) -> BoundAttention | None:
    """None when the attention was taken out of the block."""
    if is_absent(block, spec):
        return None
    owner = _submodule(block, path, spec.module, "attention")
    relative = {"query": spec.query, "key": spec.key, "value": spec.value, "output": spec.output}
    modules = {f"{path}.{r}": _submodule(block, path, r, role) for role, r in relative.items()}
    out_columns = shape(modules[f"{path}.{spec.output}"])[1]
    size = getattr(owner, spec.head_size, None)
    if spec.head_count is not None:
        size = out_columns // getattr(owner, spec.head_count)
    if not isinstance(size, int):
        raise ArchitectureError(f"{path}.{spec.module} does not say its head size: it has no {spec.head_size!r}")
    heads = out_columns // size
    if spec.layout == "separate":
        kv_heads = shape(modules[f"{path}.{spec.key}"])[0] // size
    else:
        kv_heads = (shape(modules[f"{path}.{spec.query}"])[0] // size - heads) // 2
    if kv_heads < 1 or heads % kv_heads or out_columns != heads * size:
        raise ArchitectureError(
            f"{path}.{spec.output} has {out_columns} inputs, and the attention {kv_heads} KV groups: "
            f"these do not fit heads of size {size}"
        )
    index = _attention_rows(spec, heads, kv_heads, size)
    slots = tuple(
        Slot(role, f"{path}.{r}", "in" if role == "output" else "out", index[role]) for role, r in relative.items()
    )
    _check_cover(slots, modules, path)
    name = f"{path}.{spec.module}" if spec.module else path
    return BoundAttention(spec, name, owner, heads, kv_heads, size, slots, modules, _carried(spec, owner, heads))


def _carried(spec: Attention, owner: nn.Module, heads: int) -> dict[str, int]:
    """The parameters with one entry a head that this block has (only the first has them where they are handed on)."""
    present = {name for name, _ in owner.named_parameters()}
    carried = {path: dim for path, dim in spec.per_head.items() if path in present}
    for path, dim in carried.items():
        size = owner.get_parameter(path).shape[dim]
        if size != heads:
            raise ArchitectureError(f"{path} has {size} entries where the attention has {heads} heads")
    return carried


def _attention_rows(spec: Attention, heads: int, kv_heads: int, size: int) -> dict[str, torch.Tensor]:
    """Positions of every head in its matrix, (heads or KV groups, head size), per role."""

    def runs(starts: torch.Tensor) -> torch.Tensor:
        return starts[:, None] + torch.arange(size)

    head, group = torch.arange(heads), torch.arange(kv_heads)
    rows = {"output": runs(head * size)}
    if spec.layout == "separate":
        rows.update(query=runs(head * size), key=runs(group * size), value=runs(group * size))
    elif spec.layout == "concatenated":
        rows.update(
            query=runs(head * size), key=runs((heads + group) * size), value=runs((heads + kv_heads + group) * size)
        )
    else:  # per_head is per_group with one query head a group
        per = heads // max(kv_heads, 1)
        start = group * (per + 2) * size
        rows.update(
            query=runs((head // per) * (per + 2) * size + (head % per) * size),
            key=runs(start + per * size),
            value=runs(start + (per + 1) * size),
        )
    return rows


def _has(block: nn.Module, relative: str) -> bool:
    return any(name == relative for name, _ in block.named_modules())


def _has_matrices(block: nn.Module, spec: Attention) -> bool:
    return all(_has(block, path) for path in (spec.query, spec.key, spec.value, spec.output))


def _mlp_form(forms: Mlp | tuple[Mlp, ...], block: nn.Module, *, needed: bool) -> Mlp | None:
    """The first form whose paths the block has; else the last if `needed`, so that binding names what is missing."""
    alternatives = forms if isinstance(forms, tuple) else (forms,)
    for form in alternatives:
        if all(_has(block, path) for path in (form.up, form.down, form.gate) if path is not None):
            return form
    return alternatives[-1] if needed else None


def _bind_mlp(spec: Mlp, path: str, block: nn.Module) -> BoundMlp | None:
    """None when the MLP was taken out of the block."""
    if is_absent(block, spec):
        return None
    relative = {"up": spec.up, "down": spec.down} | ({"gate": spec.gate} if spec.gate else {})
    modules = {f"{path}.{r}": _submodule(block, path, r, role) for role, r in relative.items()}
    channels = shape(modules[f"{path}.{spec.down}"])[1]
    each = torch.arange(channels)[:, None]
    fused = spec.gate == spec.up
    slots = [Slot("up", f"{path}.{spec.up}", "out", each + channels if fused else each)]
    slots += [Slot("gate", f"{path}.{spec.gate}", "out", each)] if spec.gate else []
    slots += [Slot("down", f"{path}.{spec.down}", "in", each)]
    _check_cover(tuple(slots), modules, path)
    owner = _submodule(block, path, spec.module, "mlp") if spec.module else block
    return BoundMlp(spec, f"{path}.{spec.module}" if spec.module else path, owner, channels, tuple(slots), modules)


def _check_cover(slots: tuple[Slot, ...], modules: dict[str, nn.Module], path: str) -> None:
    """Every row (or column) of a matrix that units share out belongs to exactly one unit of one role."""
    owned: dict[tuple[str, str], int] = {}
    for slot in slots:
        owned[slot.path, slot.axis] = owned.get((slot.path, slot.axis), 0) + slot.index.numel()
    for (name, axis), count in owned.items():
        size = shape(modules[name])[0 if axis == "out" else 1]
        if size != count:
            roles = ", ".join(s.role for s in slots if (s.path, s.axis) == (name, axis))
            raise ArchitectureError(
                f"{name} has {size} {axis}put positions where the roles {roles} of {path} need {count}"
            )
