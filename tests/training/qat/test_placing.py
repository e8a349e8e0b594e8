"""Quantizers beside the weights of a model, what it computes with them, and packing exactly that."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from tiny import tiny_llama
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from hf_shrink.errors import ShrinkError
from hf_shrink.plan import Scheme
from hf_shrink.quantization.base import METHODS
from hf_shrink.runtime.embedding import CompressedEmbedding
from hf_shrink.runtime.linear import CompressedLinear
from hf_shrink.training.qat.forward import rows_of
from hf_shrink.training.qat.placing import pack_trained, place_quantizers
from hf_shrink.training.qat.quantizer import Start, WeightQuantizer
from hf_shrink.training.qat.sharded import check_shapes

SCHEMES = {
    "self_attn.q_proj": Scheme(4, True, "group", 16),
    "self_attn.k_proj": Scheme(2, False, "group", 16),
    "self_attn.v_proj": Scheme(3, True, "channel", None),
    "self_attn.o_proj": Scheme(3, False, "channel", None),
    "mlp.gate_proj": Scheme(8, True, "tensor", None),
    "mlp.up_proj": Scheme(4, False, "tensor", None),
    "mlp.down_proj": Scheme(8, True, "channel", None, "int", 8),
}


def begin(model: nn.Module, quantizers: dict[str, WeightQuantizer]) -> None:
    """Start every quantizer where plain rounding says."""
    for path, quantizer in quantizers.items():
        weight = rows_of(model.get_submodule(path))
        found = METHODS.build("rtn", {}).solve(weight, quantizer.scheme, None, scale_dtype=weight.dtype)
        quantizer.begin(Start.of(weight, found))


def train(model: nn.Module, steps: int = 4, rate: float = 2e-3) -> list[float]:
    """Loss by step on a fixed batch."""
    ids = torch.arange(3, 51).view(2, 24)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def test_what_is_packed_is_what_was_trained_whatever_the_scheme() -> None:
    model = tiny_llama(num_hidden_layers=2)
    schemes = {f"model.layers.{i}.{name}": scheme for i in range(2) for name, scheme in SCHEMES.items()}
    names = set(model.state_dict())
    quantizers = place_quantizers(model, schemes)
    assert names <= set(model.state_dict())  # no weight was renamed
    begin(model, quantizers)
    before = {path: quantizer.grid().scale.clone() for path, quantizer in quantizers.items()}
    losses = train(model)
    assert losses[-1] < losses[0]
    assert all(not torch.equal(q.grid().scale, before[path]) for path, q in quantizers.items())
    ids = torch.arange(1, 49).view(2, 24)
    with torch.no_grad():
        trained = model(ids).logits
        weights = {path: quantizers[path](model.get_submodule(path).weight).clone() for path in schemes}
        pack_trained(model, schemes, sparse=False)
        packed = model(ids).logits
    torch.testing.assert_close(packed, trained, atol=1e-4, rtol=0)
    for path, weight in weights.items():
        module = model.get_submodule(path)
        assert isinstance(module, CompressedLinear) and torch.equal(module.weight, weight), path
    assert set(model.state_dict()).isdisjoint(n for n in names if n.endswith("proj.weight"))


def test_before_they_begin_quantizers_change_nothing() -> None:
    model = tiny_llama(num_hidden_layers=1)
    ids = torch.arange(1, 25)[None]
    with torch.no_grad():
        before = model(ids).logits
        place_quantizers(model, {"model.layers.0.mlp.down_proj": Scheme(4, True, "group", 16)})
        assert torch.equal(model(ids).logits, before)


def test_a_state_dict_takes_a_model_on_where_it_was() -> None:
    schemes = {"model.layers.0.self_attn.k_proj": Scheme(2, False, "group", 16)}
    model, other = tiny_llama(num_hidden_layers=1), tiny_llama(seed=1, num_hidden_layers=1)
    quantizers, others = place_quantizers(model, schemes), place_quantizers(other, schemes)
    begin(model, quantizers)
    train(model)
    other.load_state_dict(model.state_dict())
    (quantizer,) = others.values()
    assert quantizer.begun and not quantizer.active
    quantizer.active = True
    ids = torch.arange(1, 25)[None]
    assert torch.equal(model(ids).logits, other(ids).logits)


def test_a_copy_of_a_model_in_training_computes_with_its_own_weights() -> None:
    model = tiny_llama(num_hidden_layers=1)
    begin(model, place_quantizers(model, {"model.layers.0.mlp.up_proj": Scheme(4, True, "group", 16)}))
    twin = copy.deepcopy(model)
    ids = torch.arange(1, 25)[None]
    with torch.no_grad():
        before = model(ids).logits
        twin.get_submodule("model.layers.0.mlp.up_proj").weight.mul_(3)
        assert torch.equal(model(ids).logits, before) and not torch.allclose(twin(ids).logits, before)


def test_a_head_and_its_embedding_share_one_quantizer_and_one_table() -> None:
    model = tiny_llama(num_hidden_layers=1, tie_word_embeddings=True)
    scheme = Scheme(4, True, "group", 16)
    quantizers = place_quantizers(model, {"model.embed_tokens": scheme, "lm_head": scheme})
    assert list(quantizers) == ["model.embed_tokens"]
    assert [n for n in model.state_dict() if n.endswith("step")] == ["model.embed_tokens.weight_quantizer.step"]
    begin(model, quantizers)
    losses = train(model)
    assert losses[-1] < losses[0]
    ids = torch.arange(1, 25)[None]
    with torch.no_grad():
        trained = model(ids).logits
        pack_trained(model, {"model.embed_tokens": scheme, "lm_head": scheme}, sparse=False)
        torch.testing.assert_close(model(ids).logits, trained, atol=1e-4, rtol=0)
    assert isinstance(model.model.embed_tokens, CompressedEmbedding)
    assert model.lm_head.held is model.model.embed_tokens.held


def test_a_head_that_is_packed_alone_is_untied_first() -> None:
    model = tiny_llama(num_hidden_layers=1, tie_word_embeddings=True)
    place_quantizers(model, {"lm_head": Scheme(8, True, "channel", None)})
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert not model.config.tie_word_embeddings


def test_weights_that_are_stored_transposed() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2)).eval()
    schemes = {"transformer.h.0.mlp.c_fc": Scheme(3, True, "group", 16)}
    quantizers = place_quantizers(model, schemes)
    begin(model, quantizers)
    assert quantizers["transformer.h.0.mlp.c_fc"].step.shape == (128, 2)
    train(model)
    ids = torch.arange(1, 25)[None]
    with torch.no_grad():
        trained = model(ids).logits
        pack_trained(model, schemes, sparse=False)
        torch.testing.assert_close(model(ids).logits, trained, atol=1e-4, rtol=0)


def test_a_start_whose_method_rounds_elsewhere_moves_the_weights_there() -> None:
    weight, scheme = torch.randn(6, 32), Scheme(3, True, "group", 16)
    found = METHODS.build("rtn", {}).solve(weight, scheme, None, scale_dtype=torch.float32)
    assert Start.of(weight, found).correction is None
    values = found.values.clone()
    values[0, :4] = (values[0, :4] + 2).clamp(-4, 3)
    other = replace(found, values=values)
    start = Start.of(weight, other)
    assert start.correction is not None and 0 < int((start.correction != 0).sum()) <= 4
    linear = nn.Linear(32, 6, bias=False)
    linear.weight.data = weight + start.correction
    quantizer = WeightQuantizer(scheme, 6, 32, torch.float32)
    quantizer.begin(start)
    assert torch.equal(quantizer.quantized(linear.weight).values, values)


@pytest.mark.parametrize(("left", "size"), [(48, 16), (40, 20), (37, 37)])
def test_groups_are_made_of_the_inputs_that_are_left(left: int, size: int) -> None:
    """48 inputs in groups of 16, 40 in groups of 20 and not 10, for which there is no room; 37 is a prime."""
    weight, kept = torch.randn(6, 64), torch.randperm(64)[:left].sort().values
    quantizer = WeightQuantizer(Scheme(4, False, "group", 16), 6, 64, torch.float32, loses_inputs=True)
    quantizer.step.data = quantizer.step.data[:, :3]  # as if there were room for three groups
    quantizer.unit, quantizer.zero_point = quantizer.unit[:, :3], quantizer.zero_point[:, :3]
    quantizer.keep(kept)
    assert quantizer.scheme.group_size == size
    found = METHODS.build("rtn", {}).solve(weight[:, kept], quantizer.scheme, None, scale_dtype=torch.float32)
    quantizer.begin(Start.of(quantizer.left(weight), found))
    trained = weight.clone().requires_grad_()
    fake = quantizer(trained)
    fake.square().sum().backward()
    gone = torch.ones(64, dtype=torch.bool).index_fill(0, kept, False)
    assert not fake[:, gone].any() and not trained.grad[:, gone].any()
    assert quantizer.step.grad[:, : left // size].any() and not quantizer.step.grad[:, left // size :].any()
    rows = torch.tensor([0, 2, 5])
    quantizer.cut(rows)
    packed = quantizer.quantized(weight[rows][:, kept])
    torch.testing.assert_close(packed.dequantized(), fake.detach()[rows][:, kept], rtol=0, atol=1e-6)


def test_flat_pieces_of_weights_are_refused_with_the_remedy() -> None:
    linear = nn.Linear(4, 3)
    check_shapes(linear, [linear])
    linear.weight = nn.Parameter(linear.weight.detach().flatten()[:6])
    with pytest.raises(ShrinkError, match="FSDP2"):
        check_shapes(linear, [linear])


def test_a_weight_of_zeros_only_stays_so() -> None:
    quantizer = WeightQuantizer(Scheme(4, False, "group", 16), 6, 32, torch.float32)
    weight = torch.zeros(6, 32, requires_grad=True)
    found = METHODS.build("rtn", {}).solve(weight, quantizer.scheme, None, scale_dtype=torch.float32)
    quantizer.begin(Start.of(weight, found))
    out = quantizer(weight)
    out.sum().backward()
    assert not out.any() and torch.isfinite(quantizer.step.grad).all()
