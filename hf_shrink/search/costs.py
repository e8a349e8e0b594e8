"""What matrices, and what lies around them, take: exact bytes, and seconds by this device's table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_shrink.architectures.bound import BoundAttention, BoundBlock, BoundMlp
from hf_shrink.architectures.linears import shape
from hf_shrink.errors import ArchitectureError
from hf_shrink.plan import Scheme
from hf_shrink.search.latency import LatencyTable, rest_of_blocks
from hf_shrink.search.options import Cost
from hf_shrink.search.storage import FILE, Storage


class Costs:
    """Prices for one model. Remembers which tensors were asked about: what is left at the end is fixed.

    Args:
        blocks: all blocks of the model.
        latency: None: nothing has seconds.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[BoundBlock], storage: Storage, latency: LatencyTable | None
    ) -> None:
        self._model = model
        self._storage = storage
        self._latency = latency
        self._counted: set[str] = set()
        self._matrices: dict[tuple[str, int, int, Scheme | None], Cost] = {}
        self._seconds_of_rest: Mapping[str, float] = {}
        if latency is not None:
            self._seconds_of_rest = rest_of_blocks(model, [block.module for block in blocks], latency)

    def matrix(self, path: str, module: nn.Module, rows: int, columns: int, scheme: Scheme | None) -> Cost:
        """What a matrix of that size takes, its bias included. `scheme`: None: it stays dense."""
        key = path, rows, columns, scheme
        if key not in self._matrices:
            self._counted |= {f"{path}.weight", f"{path}.bias"}
            seconds = {} if self._latency is None else self._latency.matrix(rows, columns, scheme)
            self._matrices[key] = Cost(self._storage.matrix(path, module, rows, columns, scheme), 0, seconds)
        return self._matrices[key]

    def matrices(
        self, modules: Mapping[str, nn.Module], sizes: Mapping[str, tuple[int, int]], schemes: Mapping[str, Scheme]
    ) -> Cost:
        """Several of them."""
        return sum((self.matrix(p, m, *sizes[p], schemes.get(p)) for p, m in modules.items()), start=Cost())

    def outer(self, paths: Sequence[str], scheme: Scheme | None, *, multiplied: bool) -> Cost:
        """An embedding or head under all of its paths. `multiplied`: by a head; of an embedding a row is looked up."""
        self._counted |= {f"{path}.{name}" for path in paths for name in ("weight", "bias")}
        module = self._model.get_submodule(paths[0])
        rows, columns = _weight(module).shape
        biases = self._storage.state.keys() & {f"{path}.bias" for path in paths[1:]}  # not tied as the weights are
        cost = self.matrix(paths[0], module, rows, columns, scheme) + Cost(self._storage.dense(biases))
        return cost if multiplied else Cost(cost.bytes)

    def rest(self, block: BoundBlock) -> Cost:
        """A block besides the matrices asked about so far: norms and the like."""
        names = {name for name in self._storage.state if name.startswith(block.path + ".")}
        rest = Cost(self._storage.dense(names - self._counted), 0, self._seconds_of_rest)
        self._counted |= names
        return rest

    def stand_in(self, part: BoundAttention | BoundMlp) -> Cost:
        """What is left of a part that was taken out: one number, and the bias of its last matrix."""
        path = part.slot("down" if isinstance(part, BoundMlp) else "output").path
        names = {f"{path}.bias"} & self._storage.state.keys()
        dtype = self._storage.dtype_of(_weight(part.modules[path]))
        return Cost(self._storage.tensor(f"{path}.weight", dtype, (1,)) + self._storage.dense(names))

    def cache(self, attention: BoundAttention, heads: int, groups: int) -> int:
        """Bytes of one token's keys and values, with so many query heads and KV groups left."""
        weight = _weight(next(iter(attention.modules.values())))
        return attention.cached(heads, groups) * self._storage.dtype_of(weight).itemsize

    def fixed(self) -> Cost:
        """Everything that was not asked about. Call it last."""
        seconds: Mapping[str, float] = {}
        head = self._model.get_output_embeddings() if isinstance(self._model, PreTrainedModel) else None
        if self._latency is not None and head is not None:
            path = next(path for path, module in self._model.named_modules() if module is head)
            if f"{path}.weight" not in self._counted:
                seconds = self._latency.matrix(*shape(head), None)
        kept = (name for name in self._storage.state if name not in self._counted)
        return Cost(FILE + self._storage.dense(kept), 0, seconds)


def check_cached(model: PreTrainedModel, dense: Cost) -> None:
    """Raises ArchitectureError where a model writes text and nothing is known of its KV cache. `dense`: its cost."""
    if model.can_generate() and not dense.cache:
        raise ArchitectureError(
            f"the memory of {type(model).__name__} cannot be predicted: no attention with query, key and value was "
            "found in it, so what its cache takes is not known; give a budget in bytes"
        )


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight
