"""Folding changes no output: every family, every feed, and the rotation where the family has one."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from conformance import cases, cases_encoders
from conformance.references import outputs
from tiny import tiny_llama
from torch import Tensor, nn
from transformers import GemmaConfig, GemmaForCausalLM, LlamaModel, PreTrainedModel

from hf_shrink.architectures import bind
from hf_shrink.architectures.feeds import Feed, find_feeds
from hf_shrink.architectures.linears import matrix
from hf_shrink.architectures.residual import ResidualStream, find_residual
from hf_shrink.ops.rotation import random_rotation
from hf_shrink.transforms.fold import fold_rotation, fold_scales

Built = tuple[Callable[[], PreTrainedModel], Callable[[], dict[str, Tensor]]]


def _norms_minus_one() -> PreTrainedModel:
    """Norms that store their weight minus 1, and no others: the one kind that can be rotated."""
    config = GemmaConfig(**{**cases.GROUPED, "head_dim": 10})
    return cases._build(GemmaForCausalLM, config)


EVERY: dict[str, Built] = {
    **{name: (case.build, case.inputs) for name, case in cases.CASES.items()},
    **{name: (case.build, case.inputs) for name, case in cases_encoders.CASES.items()},
    "gemma": (_norms_minus_one, cases.CASES["llama"].inputs),
}
ROTATED = {
    *("llama", "llama_classifier", "llama_multi_query", "llama_derived_head_size", "mistral", "qwen2", "qwen3"),
    *("smollm3", "phi3", "gemma"),
}
# Feeds of one block: norm to query, key, value; norm to MLP; value to output; up to down.
FOUR = {*ROTATED, "llama_tied", "gemma2", "gemma3_text", "gemma3", "opt", "t5_encoder"}
every_family = pytest.mark.parametrize("name", EVERY)


def feeds(model: PreTrainedModel) -> list[Feed]:
    return [
        feed
        for stack in bind(model).stacks
        for block in stack.blocks
        for feed in find_feeds(block, stack.spec, model.config).found
    ]


def worst(before: list[Tensor], after: list[Tensor]) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(after, before, strict=True))


def rounding(model: nn.Module) -> float:
    """RMSNorms compute in float32 whatever they are given; LayerNorms in the model's dtype."""
    return 2e-5 if any("RMSNorm" in type(module).__name__ for module in model.modules()) else 1e-12


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scales_change_nothing(name: str, dtype: torch.dtype) -> None:
    build, inputs = EVERY[name]
    model = build().to(dtype)
    given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs().items()}
    before, old = outputs(model, given), copy.deepcopy(model.state_dict())
    found = feeds(model)
    generator = torch.Generator().manual_seed(0)
    for feed in found:
        scale = torch.rand(feed.units, generator=generator) * 3 + 0.3
        used = fold_scales(model, feed, scale, dtype)
        torch.testing.assert_close(used.float(), scale, rtol=1e-3, atol=0)
    if name in FOUR:
        assert len(found) == 4 * len(bind(model).blocks)
    for feed in found:
        for path in (feed.source.path, *feed.readers):
            assert not torch.equal(model.get_submodule(path).weight, old[f"{path}.weight"]), path
    assert worst(before, outputs(model, given)) < (1e-4 if dtype == torch.float32 else rounding(model))


@every_family
def test_rotation_changes_nothing_or_says_why_not(name: str) -> None:
    build, inputs = EVERY[name]
    model, given = build(), inputs()
    streams = [find_residual(model, stack) for stack in bind(model).stacks]
    if name not in ROTATED:
        assert all(isinstance(stream, str) and len(stream) > 20 for stream in streams)
        return
    (stream,) = streams
    assert isinstance(stream, ResidualStream)
    before = outputs(model, given)
    embedding = model.get_submodule(stream.embedding).weight.detach().clone()
    fold_rotation(model, stream, random_rotation(stream.width, seed=0))
    after = outputs(model, given)
    assert worst(before, after) < 1e-4
    assert (model.get_submodule(stream.embedding).weight - embedding).norm() > 0.5 * embedding.norm()
    for reader in stream.readers:
        norm = model.get_submodule(reader.norm).weight + stream.offset
        assert torch.equal(norm, torch.ones_like(norm))


@pytest.mark.parametrize("name", sorted(ROTATED))
def test_rotation_in_float64(name: str) -> None:
    build, inputs = EVERY[name]
    model, given = build().double(), inputs()
    before = outputs(model, given)
    (stream,) = (find_residual(model, stack) for stack in bind(model).stacks)
    assert isinstance(stream, ResidualStream)
    fold_rotation(model, stream, random_rotation(stream.width, seed=0))
    assert worst(before, outputs(model, given)) < 2e-5  # what float32 inside the norms leaves, after four blocks


def test_rotation_removes_outlying_channels() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 7] *= 100
    x = torch.arange(5, 45)[None]

    def peak() -> float:
        with torch.no_grad():
            stream = model.model.embed_tokens(x)[0]
        return float(stream.abs().max() / stream.square().mean().sqrt())

    before = peak()
    stream = find_residual(model, bind(model).stacks[0])
    assert isinstance(stream, ResidualStream)
    fold_rotation(model, stream, random_rotation(48, seed=0))
    assert peak() < before / 3


def test_query_heads_of_a_group_share_their_scale() -> None:
    model = tiny_llama()  # 6 query heads, 3 KV groups, head size 16
    feed = next(f for f in feeds(model) if f.readers[0].endswith("o_proj"))
    assert feed.units == 3 * 16
    unit = feed.unit.view(6, 16)
    for group in range(3):
        assert torch.equal(unit[2 * group], unit[2 * group + 1])
        assert torch.equal(unit[2 * group], torch.arange(16) + 16 * group)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_a_norm_loses_by_rounding_goes_into_the_scales(dtype: torch.dtype) -> None:
    model = cases.CASES["gemma2"].build()
    feed = feeds(model)[0]
    norm, reader = model.get_submodule(feed.source.path), model.get_submodule(feed.readers[0])
    with torch.no_grad():  # weight + 1 close to 0: stored minus 1, it has few digits
        norm.weight.copy_(torch.linspace(-0.99, 0.5, feed.units).to(dtype))
    before = (norm.weight.double() + 1) * matrix(reader).double()
    used = fold_scales(model, feed, torch.linspace(0.2, 7, feed.units), dtype)
    assert torch.equal(norm.weight, norm.weight.to(dtype).float())
    torch.testing.assert_close((norm.weight.double() + 1) * matrix(reader).double(), before, rtol=1e-6, atol=1e-9)
    assert used.min() > 0


def test_a_norm_weight_of_zero_is_left_alone() -> None:
    model = tiny_llama()
    feed = feeds(model)[0]
    norm = model.get_submodule(feed.source.path)
    with torch.no_grad():
        norm.weight[3] = 0
    used = fold_scales(model, feed, torch.full((48,), 4.0), torch.float32)
    assert used[3] == 1
    assert norm.weight[3] == 0
    assert torch.isfinite(matrix(model.get_submodule(feed.readers[0]))).all()


def test_what_has_no_place_in_the_stream_is_named() -> None:
    model = tiny_llama()
    model.adapter = nn.Linear(48, 48)
    stack = bind(model).stacks[0]
    assert "adapter.weight has no known place" in str(find_residual(model, stack))
    bare = LlamaModel(tiny_llama().config)
    assert "no head" in str(find_residual(bare, bind(bare).stacks[0]))
    tied = tiny_llama(tie_word_embeddings=True)
    assert "quantize.overrides" in str(find_residual(tied, bind(tied).stacks[0]))
