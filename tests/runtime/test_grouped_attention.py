"""Attention of single tokens and of prompts: against float64, against transformers' own, and in whole models."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny_llama
from torch import Tensor
from transformers import DeepseekV32Config, DeepseekV32ForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_shrink import optimize_for_inference, shrink
from hf_shrink.ops.precision import multiplies_bfloat16
from hf_shrink.runtime import attention
from hf_shrink.runtime.attention import NAME, ROWS, grouped_attention, sdpa_by_group, use_grouped_attention


def reference(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Head by head in float64."""
    share = query.shape[1] // key.shape[1]
    heads = []
    for head in range(query.shape[1]):
        scores = query[:, head].double() @ key[:, head // share].double().transpose(1, 2) * scaling
        if mask is not None:
            own = mask[:, head if mask.shape[1] > 1 else 0]
            scores = scores.masked_fill(~own, -torch.inf) if own.dtype == torch.bool else scores + own.double()
        heads.append(scores.softmax(-1) @ value[:, head // share].double())
    return torch.stack(heads, 2)


def masks(batch: int, heads: int, keys: int) -> dict[str, Tensor | None]:
    some = torch.rand(batch, 1, 1, keys) < 0.7
    some[..., 0] = True
    return {
        "none": None,
        "shared": some,
        "one for all": some[:1],
        "a head": torch.randn(batch, heads, 1, keys),
        "added": torch.where(some, 0.0, -torch.inf),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (5, 5), (4, 1)])
def test_one_token_attends_as_in_float64(heads: int, groups: int, dtype: torch.dtype) -> None:
    module: Any = SimpleNamespace(num_key_value_groups=heads // groups, is_causal=True)
    for batch, keys in ((1, 1), (3, 13)):
        query = torch.randn(batch, heads, 1, 8).to(dtype)
        key = torch.randn(batch, groups, keys, 8).to(dtype)
        value = torch.randn(batch, groups, keys, 12).to(dtype)
        for name, mask in masks(batch, heads, keys).items():
            mask = mask if mask is None or mask.dtype == torch.bool else mask.to(dtype)
            found, weights = sdpa_by_group(module, query, key, value, mask, scaling=0.3)
            assert weights is None
            assert found.shape == (batch, 1, heads, 12)
            assert found.dtype == dtype
            wanted = reference(query, key, value, mask, 0.3)
            error = (found.double() - wanted).abs().max()
            assert error <= 4 * torch.finfo(dtype).eps * value.abs().max(), (name, batch)


@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (5, 5), (4, 1)])
@pytest.mark.parametrize(("tokens", "keys"), [(65, 65), (150, 150), (128, 200)])
def test_a_prompt_in_bfloat16_attends_as_in_float64(heads: int, groups: int, tokens: int, keys: int) -> None:
    module: Any = SimpleNamespace(num_key_value_groups=heads // groups, is_causal=True)
    query, key, value = (
        torch.randn(2, heads, tokens, 8),
        torch.randn(2, groups, keys, 8),
        torch.randn(2, groups, keys, 12),
    )
    # Of a longer cache, a prompt sees what is in front of it.
    causal = torch.ones(tokens, keys, dtype=torch.bool).tril()[None, None].expand(2, -1, -1, -1)
    low = [part.bfloat16() for part in (query, key, value)]
    wanted = reference(*low, causal, 0.3)
    found, weights = sdpa_by_group(module, *low, None, scaling=0.3)
    assert weights is None
    assert found.shape == (2, tokens, heads, 12)
    assert found.dtype == torch.bfloat16
    least = (sdpa_attention_forward(module, *low, None, scaling=0.3)[0].double() - wanted).norm()
    assert (found.double() - wanted).norm() <= 3 * least
    with torch.autocast("cpu", torch.bfloat16):
        mixed, _ = sdpa_by_group(module, query, low[1], value, None, scaling=0.3)
    assert mixed.dtype == torch.bfloat16
    assert (mixed.double() - wanted).norm() <= 4 * least


@pytest.mark.skipif(not multiplies_bfloat16(torch.device("cpu")), reason="no bfloat16 products on this processor")
def test_which_prompts_go_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    own = attention._some_rows_at_a_time
    monkeypatch.setattr(attention, "_some_rows_at_a_time", lambda *args: taken.append(args) or own(*args))
    module: Any = SimpleNamespace(num_key_value_groups=3, is_causal=True)

    def goes(
        tokens: int = 70,
        dtype: torch.dtype = torch.bfloat16,
        mask: Tensor | None = None,
        trained: str = "",
        **options: Any,
    ) -> bool:
        query, key = torch.randn(2, 6, tokens, 8, dtype=dtype), torch.randn(2, 2, tokens, 8, dtype=dtype)
        value = torch.randn(2, 2, tokens, 8, dtype=dtype)
        for name, part in (("query", query), ("key", key), ("value", value)):
            part.requires_grad_(name == trained)
        before = len(taken)
        found, _ = sdpa_by_group(module, query, key, value, mask, scaling=0.3, **options)
        wanted, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3, **options)
        torch.testing.assert_close(found, wanted, atol=0.03, rtol=0.03)
        return len(taken) > before

    assert goes()
    assert not goes(tokens=ROWS)
    assert not goes(dtype=torch.float32)
    assert not goes(mask=torch.ones(2, 1, 70, 70, dtype=torch.bool))
    assert not goes(is_causal=False)
    assert not any(goes(trained=name) for name in ("query", "key", "value"))
    module.is_causal = False
    assert not goes()
    assert goes(is_causal=True)


def test_everything_else_is_transformers_own() -> None:
    module: Any = SimpleNamespace(num_key_value_groups=3, is_causal=True)
    query, key, value = torch.randn(2, 6, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    for options in ({}, {"position_bias": torch.randn(1, 6, 5, 5)}):
        found, _ = sdpa_by_group(module, query, key, value, None, scaling=0.3, **options)
        wanted, _ = sdpa_attention_forward(module, query, key, value, None, scaling=0.3, **options)
        assert torch.equal(found, wanted)
    biased, _ = sdpa_by_group(module, query[:, :, :1], key, value, None, position_bias=torch.randn(1, 6, 1, 5))
    plain, _ = sdpa_by_group(module, query[:, :, :1], key, value, None)
    assert not torch.allclose(biased, plain)
    with pytest.raises(ValueError, match="softcap"):
        sdpa_by_group(module, query[:, :, :1], key, value, None, softcap=30.0)


@pytest.mark.parametrize("padded", [False, True])
def test_a_model_generates_the_same(padded: bool) -> None:
    model = tiny_llama()
    ids = torch.randint(3, 320, (2, 9))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :4] = 0
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    wanted = [model.generate(ids, cache_implementation=cache, **options) for cache in (None, "static")]
    assert optimize_for_inference(model).config._attn_implementation == NAME
    found = [model.generate(ids, cache_implementation=cache, **options) for cache in (None, "static")]
    assert all(map(torch.equal, found, wanted))
    assert "attn" not in str(model.config.to_dict())


def test_other_attention_stays_as_it_is() -> None:
    model = tiny_llama()
    model.set_attn_implementation("eager")
    use_grouped_attention(model)
    assert model.config._attn_implementation == "eager"


def test_work_on_a_model_leaves_its_attention_as_it_was() -> None:
    model = tiny_llama()
    with grouped_attention(model):
        assert model.config._attn_implementation == NAME
        with grouped_attention(model):
            pass
        assert model.config._attn_implementation == NAME
    assert model.config._attn_implementation == "sdpa"
    shrink(model, {"steps": [{"quantize": {"method": "rtn"}}]}, optimize=False, progress=False)
    assert model.config._attn_implementation == "sdpa"


def tiny_sparse() -> DeepseekV32ForCausalLM:
    """Looks at four keys a query only, which its code sees to where the name is one that it knows."""
    torch.manual_seed(0)
    config = DeepseekV32Config(
        vocab_size=320,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        first_k_dense_replace=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        kv_lora_rank=16,
        q_lora_rank=24,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        index_topk=4,
        index_head_dim=16,
        index_n_heads=2,
        initializer_range=0.2,
    )
    return DeepseekV32ForCausalLM(config).eval()


def test_a_model_whose_code_asks_for_stock_names_keeps_its_own() -> None:
    model = tiny_sparse()
    ids = torch.randint(320, (2, 40))
    with torch.no_grad():
        wanted = model(ids).logits
        with grouped_attention(model):
            assert torch.equal(model(ids).logits, wanted)
        optimize_for_inference(model)
        assert torch.equal(model(ids).logits, wanted)
        model.config._attn_implementation_internal = NAME  # what it would be under ours
        assert not torch.allclose(model(ids).logits, wanted, atol=1e-3)


def test_what_a_class_inherits_counts() -> None:
    heirs = []
    for model in (tiny_sparse(), tiny_llama()):
        kind: Any = type("Heir", (type(model),), {"__module__": "tiny"})  # a file that asks for nothing
        heirs.append(kind(model.config))
    with grouped_attention(*heirs):
        assert [heir.config._attn_implementation for heir in heirs] == ["sdpa", NAME]
    assert [heir.config._attn_implementation for heir in heirs] == ["sdpa", "sdpa"]


@pytest.mark.parametrize(
    ("code", "asks"),
    [
        ('if self.config._attn_implementation in ("eager", "sdpa"):', True),
        ('x = config._attn_implementation != "sdpa"', True),
        ('if "sdpa" == config._attn_implementation:', True),
        ("self.attn = CLASSES[config._attn_implementation](config)", True),
        ("self.attn = CLASSES.get(config._attn_implementation)", True),
        ("if config._attn_implementation not in supported:", True),
        ('using_eager = self.config._attn_implementation == "eager"', False),
        ('if config._attn_implementation == "flash_attention_2":', False),
        ("ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)", False),
        ("mask = ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation]", False),
        ("if config._attn_implementation not in ALL_MASK_ATTENTION_FUNCTIONS._global_mapping:", False),
        ("self._attn_implementation = config._attn_implementation", False),
    ],
)
def test_what_counts_as_asking_for_a_name(code: str, asks: bool) -> None:
    assert bool(attention._ASKS_FOR_NAMES.search(code)) == asks
