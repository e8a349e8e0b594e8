"""Several modules that hold one weight: an output head and its embedding."""

from __future__ import annotations

from hf_shrink.runtime.packed import PackedModule


def share(*modules: PackedModule) -> None:
    """Let modules hold one weight, the first one's, from now on: also after moves, casts, loading and copies."""
    for module in modules:
        module.sharing = modules
        if module is not modules[0]:
            module.adopt(modules[0])
