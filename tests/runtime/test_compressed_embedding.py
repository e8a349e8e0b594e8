"""CompressedEmbedding: rows of the packed weight by index."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from hf_shrink.plan import Scheme
from hf_shrink.quantization.rtn import RTN
from hf_shrink.runtime import CompressedEmbedding, CompressedLinear
from hf_shrink.runtime import packed as packed_module
from hf_shrink.runtime.sharing import share

SCHEMES = [
    Scheme(bits, symmetric, strategy, size)
    for bits in (3, 4, 8)
    for symmetric in (True, False)
    for strategy, size in (("tensor", None), ("channel", None), ("group", 16))
]


def compressed(scheme: Scheme, dtype=torch.float32, padding_idx=None) -> CompressedEmbedding:
    result = RTN().solve(torch.randn(37, 48) + 0.2, scheme, None, scale_dtype=dtype)
    return CompressedEmbedding.from_quantized(result, padding_idx)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_lookup_is_that_of_the_dense_weight(scheme, dtype):
    embedding = compressed(scheme, dtype)
    ids = torch.tensor([[0, 36, 5], [5, 5, 17]])
    assert torch.equal(embedding(ids), F.embedding(ids, embedding.weight))
    assert embedding(ids).dtype == dtype
    assert embedding(torch.tensor(3)).shape == (48,)
    assert embedding(torch.empty(2, 0, dtype=torch.long)).shape == (2, 0, 48)


def test_only_the_rows_looked_up_are_unpacked(monkeypatch):
    embedding = compressed(SCHEMES[1])
    unpacked = []
    original = packed_module.unpack_weight

    def spy(packed, *arguments):
        unpacked.append(len(packed))
        return original(packed, *arguments)

    monkeypatch.setattr(packed_module, "unpack_weight", spy)
    embedding(torch.tensor([1, 2]))
    assert unpacked == [2]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_state_dict_casts_and_copies(scheme):
    embedding = compressed(scheme, torch.bfloat16, padding_idx=2)
    empty = CompressedEmbedding.empty(scheme, 37, 48, 2, torch.bfloat16)
    empty.load_state_dict(embedding.state_dict())
    assert torch.equal(empty.weight, embedding.weight)
    twin = copy.deepcopy(empty).float()
    assert twin.weight.dtype == torch.float32 and twin.weight_packed.dtype == torch.int32
    assert twin.padding_idx == 2 and (twin.num_embeddings, twin.embedding_dim, twin.numel) == (37, 48, 37 * 48)
    assert "padding_idx=2" in repr(twin)


@pytest.mark.parametrize("index", [-1, 37, 47, 48])
def test_out_of_range_indices_raise(index):
    """Also where a kernel has rows of zeros behind the last, up to a whole sixteen."""
    plain = compressed(Scheme(4, True, "group", 16))
    quantized = RTN().solve(torch.randn(37, 64), Scheme(4, True, "group", 32), None, scale_dtype=torch.float32)
    head, fast = CompressedLinear.from_quantized(quantized, None), CompressedEmbedding.from_quantized(quantized)
    share(fast, head)
    head.optimize()
    assert fast.kernel is not None and fast.held.shape[0] == 48
    for embedding in (plain, fast):
        with pytest.raises(IndexError, match=f"index {index} is out of range"):
            embedding(torch.tensor([3, index, 5]))
        assert embedding(torch.tensor([0, 36])).shape[0] == 2
