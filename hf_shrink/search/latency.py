"""How long this device takes for a matrix of some size under some scheme: measured once, kept in a table on disk.

A matrix is multiplied in turn with many others of its kind, more of them than caches hold, as a model does. Times are
the least of several rounds: other work on the machine can only add to them.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_shrink.architectures.linears import is_matrix, shape
from hf_shrink.calibration.inputs import longest_text
from hf_shrink.checkpoint.record import hf_shrink_version
from hf_shrink.errors import ArchitectureError
from hf_shrink.plan import Scheme
from hf_shrink.runtime import CompressedLinear
from hf_shrink.runtime.experts import separate_modules
from hf_shrink.sharding import ranks

PURPOSES: Mapping[str, int] = {"decode": 1, "prefill": 128}  # tokens that are multiplied at once
BEYOND_CACHES = 96 << 20  # bytes of weights that are gone through in turn
MOST_COPIES = 64
CONTEXT = 64  # tokens in the KV cache when decoding is timed
ROUNDS = 5
FORMAT = 2

Build = Callable[[int, int, Scheme | None, torch.dtype, torch.device], nn.Module]


def build_linear(rows: int, columns: int, scheme: Scheme | None, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The module that a model has for such a matrix after `optimize_for_inference`."""
    if scheme is None:
        return nn.Linear(columns, rows, bias=False, device=device, dtype=dtype)
    linear = CompressedLinear.empty(scheme, columns, rows, False, dtype, device)
    linear.weight_scale.fill_(1.0)
    linear.optimize()
    return linear


@dataclass
class LatencyTable:
    """Seconds a token, by size and scheme; what is not in it yet is measured when it is asked for.

    Attributes:
        dtype: of inputs, scales and dense weights.
        path: of the table's file; None: it is not kept.
    """

    dtype: torch.dtype
    device: torch.device
    path: Path | None = None
    build: Build = build_linear
    known: dict[str, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def open(cls, dtype: torch.dtype, device: torch.device | str = "cpu", folder: Path | None = None) -> LatencyTable:
        """The table of this device, threads and library versions, from `folder` (default: `cache_folder()`)."""
        device = torch.device(device)
        path = (folder or cache_folder() / "latency") / f"{_slug(describe_device(device), str(dtype))}.json"
        return ranks().on_first(lambda: cls._read(dtype, device, path))

    @classmethod
    def _read(cls, dtype: torch.dtype, device: torch.device, path: Path) -> LatencyTable:
        table = cls(dtype, device, path)
        try:
            stored = json.loads(path.read_text())
            if stored["format"] == FORMAT and stored["device"] == describe_device(device):
                table.known = stored["seconds"]
        except (OSError, ValueError, KeyError, TypeError):
            pass  # none yet, or one that cannot be read: it is measured again and written over
        return table

    def beside(self, dtype: torch.dtype) -> LatencyTable:
        """The table of the same device for another dtype, from the same folder."""
        if self.path is None:
            return LatencyTable(dtype, self.device, build=self.build)
        found = LatencyTable.open(dtype, self.device, self.path.parent)
        found.build = self.build
        return found

    def matrix(self, rows: int, columns: int, scheme: Scheme | None) -> dict[str, float]:
        """Seconds a token by purpose, of a product with a matrix (rows, columns)."""
        key = f"{rows} x {columns} {_label(scheme)}"
        if key not in self.known:
            self.known[key] = ranks().on_first(lambda: self._measure(rows, columns, scheme))
        return dict(self.known[key])

    def save(self) -> None:
        """Write the table to its file, whole or not at all."""
        if self.path is None or not ranks().first:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        data = {"format": FORMAT, "device": describe_device(self.device), "seconds": self.known}
        partial.write_text(json.dumps(data, indent=1))
        os.replace(partial, self.path)

    @torch.no_grad()
    def _measure(self, rows: int, columns: int, scheme: Scheme | None) -> dict[str, float]:
        first = self.build(rows, columns, scheme, self.dtype, self.device)
        size = max(sum(t.nbytes for t in (*first.parameters(), *first.buffers())), 1)
        copies = min(MOST_COPIES, math.ceil(BEYOND_CACHES / size))
        modules = [first, *(self.build(rows, columns, scheme, self.dtype, self.device) for _ in range(copies - 1))]
        found = {}
        for name, tokens in PURPOSES.items():
            x = torch.ones(1, tokens, columns, dtype=self.dtype, device=self.device)
            found[name] = _least(partial(_in_turn, modules, x), self.device) / len(modules) / tokens
        return found


def _in_turn(modules: Sequence[nn.Module], x: torch.Tensor) -> None:
    for module in modules:
        module(x)


def check_timed(model: PreTrainedModel, purposes: Collection[str] = ()) -> None:
    """Raises ArchitectureError where the model cannot be timed, or not for one of the purposes."""
    if separate_modules(model):
        raise ArchitectureError(
            f"the latency of {type(model).__name__} cannot be predicted: of a mixture's experts a token takes some; "
            "give a budget in bytes"
        )
    if model.config.is_encoder_decoder or model.main_input_name != "input_ids":
        raise ArchitectureError(
            f"the latency of {type(model).__name__} cannot be predicted: only models of one stack that read tokens "
            "have latency budgets; give a budget in bytes"
        )
    if "decode" not in purposes:
        return
    if not model.can_generate():
        raise ArchitectureError(
            f"{type(model).__name__} writes no tokens, so that there is no time of decoding to limit; limit that of "
            "reading: latency: {prefill: 60%} (--budget latency:prefill:60%)"
        )
    if _context(model) < 1:
        raise ArchitectureError(
            f"{type(model).__name__} has positions for {longest_text(model)} tokens, too few to time decoding; limit "
            "the time of reading: latency: {prefill: 60%} (--budget latency:prefill:60%)"
        )


def _positions(model: PreTrainedModel) -> int:
    """Tokens that a prompt is timed with: no more than the model has positions for."""
    return min(PURPOSES["prefill"], longest_text(model) or PURPOSES["prefill"])


def _context(model: PreTrainedModel) -> int:
    """Tokens in the KV cache before decoding is timed; every run of it adds one."""
    return min(CONTEXT, _positions(model) - 1 - ROUNDS)


def model_seconds(model: PreTrainedModel) -> dict[str, float]:
    """Seconds a token of the model as it is, by purpose, the least of several runs at batch 1.

    "decode" of models that generate, with CONTEXT tokens in the KV cache; "prefill" of all. Fewer tokens where the
    model has no positions for them.

    Raises:
        ArchitectureError: an encoder-decoder, a mixture of experts, or a model that does not read tokens.
    """
    check_timed(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.get_text_config().vocab_size, (1, _positions(model)), generator=generator)
    ids = ids.to(model.device)
    cached = {"use_cache": False} if model.can_generate() else {}
    found = {"prefill": _least(lambda: model(input_ids=ids, **cached), model.device) / ids.shape[1]}
    context = _context(model)
    if model.can_generate() and context > 0:
        cache = model(input_ids=ids[:, :context], use_cache=True).past_key_values
        found["decode"] = _least(lambda: model(input_ids=ids[:, :1], past_key_values=cache), model.device)
    return found


_KNOWN: WeakKeyDictionary[nn.Module, dict[Hashable, dict[str, float]]] = WeakKeyDictionary()


def _known_seconds(model: PreTrainedModel) -> dict[str, float]:
    """`model_seconds`, timed once for a model as it is: a second time would give other limits to the same budget."""
    shapes = tuple(parameter.shape for parameter in model.parameters())
    key = model.dtype, model.device, torch.get_num_threads(), shapes
    known = _KNOWN.setdefault(model, {})
    if key not in known:
        known[key] = ranks().on_first(lambda: model_seconds(model))
    return dict(known[key])


def rest_of_blocks(model: nn.Module, blocks: Sequence[nn.Module], table: LatencyTable) -> dict[str, float]:
    """Seconds a token of a block besides its matrices: what the dense model takes more than them, in equal shares.

    Raises:
        ArchitectureError: as of `model_seconds`.
    """
    assert isinstance(model, PreTrainedModel)
    left = _known_seconds(model)
    if model.dtype != table.dtype:
        table = table.beside(model.dtype)
    modules = [module for block in blocks for module in block.modules() if is_matrix(module)]
    head = model.get_output_embeddings()
    for module in [*modules, *([head] if head is not None else [])]:
        for name, seconds in table.matrix(*shape(module), None).items():
            if name in left:
                left[name] -= seconds
    table.save()
    return {name: max(seconds, 0.0) / len(blocks) for name, seconds in left.items()}


def _least(run: Callable[[], object], device: torch.device) -> float:
    with torch.no_grad():
        run()
        times = []
        for _ in range(ROUNDS):
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            times.append(time.perf_counter() - start)
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def describe_device(device: torch.device) -> dict[str, Any]:
    """What times depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": device.type,
        "name": name,
        "threads": torch.get_num_threads() if device.type == "cpu" else 0,
        "torch": torch.__version__,
        "hf_shrink": hf_shrink_version(),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def cache_folder() -> Path:
    """Where tables and measurements are kept: HF_SHRINK_CACHE, or hf_shrink beside the Hub's cache."""
    own = os.environ.get("HF_SHRINK_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(own) if own else Path(home) / "hf_shrink"


def _slug(device: Mapping[str, Any], dtype: str) -> str:
    text = "-".join(map(str, (*device.values(), dtype.removeprefix("torch."))))
    return "".join(c if c.isalnum() or c in "-." else "_" for c in text)


def _label(scheme: Scheme | None) -> str:
    if scheme is None:
        return "dense"
    size = f"g{scheme.group_size}" if scheme.group_size else scheme.strategy
    return f"{scheme.name} {size} {'symmetric' if scheme.symmetric else 'asymmetric'}"
