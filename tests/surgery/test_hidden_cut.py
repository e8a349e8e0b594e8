"""The residual stream turned and cut: a rotation alone changes nothing, and neither does a cut of what nobody uses."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from conformance import cases
from conformance.references import outputs
from tiny import tiny_llama
from torch import Tensor
from transformers import GemmaConfig, GemmaForCausalLM, PreTrainedModel

from hf_shrink.architectures import bind
from hf_shrink.architectures.residual import ResidualStream, find_residual
from hf_shrink.ops.rotation import random_rotation
from hf_shrink.surgery import build_skeleton
from hf_shrink.surgery.hidden import Slice, slice_stream, tied_scale


def _scaled_embedding() -> PreTrainedModel:
    return cases._build(GemmaForCausalLM, GemmaConfig(**{**cases.GROUPED, "head_dim": 10}))


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    **{name: cases.CASES[name].build for name in ("llama", "qwen2", "qwen3", "smollm3", "phi3", "llama_classifier")},
    "gemma": _scaled_embedding,
}


def stream_of(model: PreTrainedModel) -> ResidualStream:
    (stack,) = bind(model).stacks
    stream = find_residual(model, stack, tied=True)
    assert isinstance(stream, ResidualStream)
    return stream


def low_rank(model: PreTrainedModel, kept: int) -> PreTrainedModel:
    """The same model, with everything that is written to the stream put into a random subspace."""
    stream = stream_of(model)
    basis = random_rotation(stream.width, seed=3)[:, :kept]
    with torch.no_grad():
        inside = basis @ basis.T
        embedding = model.get_submodule(stream.embedding).weight
        embedding.copy_(embedding.double() @ inside)
        for path in stream.writers:
            module = model.get_submodule(path)
            module.weight.copy_(inside @ module.weight.double())
            if module.bias is not None:
                module.bias.copy_(inside @ module.bias.double())
    return model


def largest(before: list[Tensor], after: list[Tensor]) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kept", [None, 30], ids=["turned", "cut"])
def test_a_turn_and_a_cut_of_unused_channels_change_nothing(name: str, kept: int | None) -> None:
    model = FAMILIES[name]().double()
    config = model.config.get_text_config()
    config.rms_norm_eps = 0.05  # large, so that it shows where the mean over fewer channels is another one
    for module in model.modules():
        for attribute in ("eps", "variance_epsilon"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.05)
    given = cases.CASES["llama" if name == "gemma" else name].inputs()
    width = stream_of(model).width
    if kept is not None:
        low_rank(model, kept)
        basis = random_rotation(width, seed=3)[:, :kept] @ random_rotation(kept, seed=5)
    else:
        basis = random_rotation(width, seed=5)
    before, stream = outputs(model, given), stream_of(model)
    ones = torch.ones(width, dtype=torch.float64)
    how = Slice(ones, ones, basis, {}, None)
    size = bind(model).blocks[0].attention.head_size
    slice_stream(model, bind(model).stacks[0], stream, how)
    after = outputs(model, given)
    assert all(a.shape == b.shape for a, b in zip(after, before, strict=True))
    assert largest(before, after) < 5e-5  # what float32 inside the norms leaves
    assert config.hidden_size == (kept or width) and bind(model).blocks[0].attention.head_size == size
    built = {path: tuple(p.shape) for path, p in build_skeleton(model).named_parameters()}
    assert built == {path: tuple(p.shape) for path, p in model.named_parameters()}
    for reader in stream.readers:
        norm = model.get_submodule(reader.norm).weight + stream.offset
        assert torch.equal(norm, torch.ones_like(norm))


def test_a_tied_head_stays_tied_and_exact_where_the_last_norm_is_even() -> None:
    model = tiny_llama(tie_word_embeddings=True)
    with torch.no_grad():
        model.model.norm.weight.fill_(1.7)
    low_rank(model.double(), 30)
    given = {"input_ids": torch.arange(3, 27)[None]}
    before, stream = outputs(model, given), stream_of(model)
    assert stream.tied
    scale, embedding, mean = tied_scale(model.model.norm.weight.detach(), torch.ones(48))
    assert torch.allclose(scale, torch.ones_like(scale)) and torch.equal(scale, embedding)
    assert mean == pytest.approx(1.7)
    basis = random_rotation(48, seed=3)[:, :30]
    slice_stream(model, bind(model).stacks[0], stream, Slice(scale, embedding, basis, {}, mean * 48 / 30))
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.in_features == 30
    assert largest(before, outputs(model, given)) < 5e-5


def test_what_the_stream_becomes() -> None:
    model = low_rank(tiny_llama().double(), 30)
    scale = torch.rand(48, dtype=torch.float64) + 0.5
    how = Slice(scale, scale, random_rotation(48, seed=1)[:, :20], {}, None)
    ids = torch.arange(3, 27)[None]
    dense = model.model.embed_tokens(ids)
    cut = copy.deepcopy(model)
    slice_stream(cut, bind(cut).stacks[0], stream_of(cut), how)
    torch.testing.assert_close(cut.model.embed_tokens(ids), how.stream(dense), rtol=0, atol=1e-12)
    expected = (dense * scale) @ how.basis * (20 / 48) ** 0.5
    torch.testing.assert_close(how.stream(dense), expected, rtol=0, atol=1e-12)


def test_the_last_norm_is_shared_out_between_stream_and_embedding() -> None:
    weight = torch.tensor([1.0, 2.0, -2.0, 0.1, 2.9])
    scale, embedding, mean = tied_scale(weight, torch.tensor([1.0, 1.0, 1.0, 1.0, 60.0]))
    assert mean == pytest.approx(1.6)
    torch.testing.assert_close(mean * scale * embedding, weight.double())  # the head is right, whatever the channel
    assert torch.equal(scale[2:], torch.ones(3).double())  # negative, tiny, loud
    torch.testing.assert_close(scale[:2], embedding[:2])
