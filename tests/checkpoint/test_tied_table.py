"""One packed table for the embedding and the head that is tied to it: in memory, through moves and on disk."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.cases import GEMMA
from tiny import tiny_llama
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

from hf_shrink import RecipeError, kernel_summary, optimize_for_inference, shrink
from hf_shrink.checkpoint.packed import packed_modules
from hf_shrink.evaluation.size import unique_bytes
from hf_shrink.plan import Scheme
from hf_shrink.runtime.optimizing import restore_layout
from hf_shrink.tuning.opened import open_model

HEADS: dict[str, Any] = {
    "W8A16": "W8A16",
    "W4A16": "W4A16",
    "W8A16 by group": {"scheme": "W8A16", "strategy": "group", "group_size": 32},
    "W3A16 asymmetric": {"scheme": "W3A16", "symmetric": False},
}


def shrunk(head: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
    """W4 blocks; 328 tokens of width 64, so that the table has no whole blocks of rows."""
    torch.manual_seed(0)
    dense = tiny_llama(
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        vocab_size=328,
        tie_word_embeddings=True,
    )
    quantize = {"method": "rtn", "scheme": "W4A16", "group_size": 32, "head": head}
    recipe = {"portable": False, "steps": [{"quantize": quantize}]}
    return shrink(dense.to(dtype), recipe, optimize=False, progress=False)


@pytest.fixture(scope="module", params=HEADS)
def plain(request: pytest.FixtureRequest) -> Any:
    return shrunk(HEADS[request.param])


def is_one(model: Any) -> bool:
    """Whether head and embedding hold the very same tensors, and nothing else."""
    head, embedding = dict(model.lm_head.named_buffers()), dict(model.model.embed_tokens.named_buffers())
    return head.keys() == embedding.keys() and all(head[name] is embedding[name] for name in head)


def test_a_word_in_the_recipe_packs_head_and_table(plain: Any) -> None:
    assert is_one(plain)
    assert plain.config.tie_word_embeddings
    assert plain.lm_head.scheme == plain.model.embed_tokens.scheme


def test_the_table_is_held_once_and_gives_the_same(plain: Any) -> None:
    fast = optimize_for_inference(copy.deepcopy(plain))
    assert is_one(fast)
    assert fast.lm_head.kernel is not None
    assert fast.model.embed_tokens.kernel is fast.lm_head.kernel
    ids = torch.randint(328, (2, 9))
    assert torch.equal(fast.model.embed_tokens(ids), plain.model.embed_tokens(ids))
    assert fast.model.embed_tokens(ids[:, :0]).shape == (2, 0, 64)
    with torch.no_grad():
        found, wanted = (model(ids).logits.float().log_softmax(-1) for model in (fast, plain))
    assert F.kl_div(found, wanted, log_target=True, reduction="batchmean") / 9 < 1e-3  # bfloat16 activations
    assert unique_bytes(fast) < 1.2 * unique_bytes(plain)


MOVES: dict[str, Callable[[Any], Any]] = {
    "clone": lambda model: model._apply(torch.clone),
    "cast": lambda model: model.to(torch.float32),
    "there and back": lambda model: model.to(torch.float32).to(torch.bfloat16),
    "copy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "head first": lambda model: (model.lm_head.to(torch.float32), model.to(torch.float32))[1],
    "tie again": lambda model: (model.tie_weights(), model)[1],
    "layout": lambda model: (restore_layout(model), model)[1],
}


@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize("move", MOVES)
def test_it_stays_one_table(move: str, optimized: bool) -> None:
    model = shrunk("W8A16")
    table = model.model.embed_tokens.weight
    model = optimize_for_inference(model) if optimized else model
    moved = MOVES[move](model)
    assert is_one(moved)
    assert (moved.lm_head.kernel is not None) == (optimized and move != "layout")
    assert torch.equal(moved.lm_head.weight.to(torch.bfloat16), table)
    assert torch.equal(moved.model.embed_tokens(torch.arange(328)).to(torch.bfloat16), table)


@pytest.mark.parametrize("optimized", [False, True])
def test_what_is_loaded_into_the_embedding_is_in_the_head(optimized: bool) -> None:
    model, other = shrunk("W8A16"), shrunk("W8A16")
    other.model.embed_tokens.weight_packed.bitwise_xor_(1)
    model = optimize_for_inference(model) if optimized else model
    table = {name: tensor for name, tensor in other.state_dict().items() if "embed_tokens" in name}
    model.load_state_dict(table, strict=False)
    assert is_one(model)
    assert torch.equal(model.lm_head.weight, other.lm_head.weight)
    assert (model.lm_head.kernel is not None) == optimized


def test_tuning_leaves_it_alone(plain: Any) -> None:
    opened = open_model(copy.deepcopy(plain), rounding=False)
    assert len(opened.linears) == 2 * 7
    opened.close()
    assert is_one(opened.model)


def test_saved_once_and_loaded_as_one(plain: Any, tmp_path: Path) -> None:
    optimize_for_inference(copy.deepcopy(plain)).save_pretrained(tmp_path / "fast")
    plain.save_pretrained(tmp_path / "plain")
    written = (tmp_path / "fast" / "model.safetensors").read_bytes()
    assert written == (tmp_path / "plain" / "model.safetensors").read_bytes()
    assert b"lm_head" not in written[:20000]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "fast")
    assert is_one(loaded)
    assert loaded.config.tie_word_embeddings
    assert loaded.lm_head.kernel is not None
    assert all(map(torch.equal, loaded.state_dict().values(), plain.state_dict().values()))
    dense = loaded.dequantize()
    assert not packed_modules(dense)
    assert dense.lm_head.weight is dense.model.embed_tokens.weight


def test_a_head_of_its_own_is_packed_alone_and_portable() -> None:
    quantize = {"method": "rtn", "scheme": "W4A16", "group_size": 16, "head": "W8A16", "ignore": ["lm_head"]}
    model = shrink(tiny_llama(), {"steps": [{"quantize": quantize}]}, progress=False)
    assert model.lm_head.scheme == Scheme(8, True, "channel", None)
    assert isinstance(model.model.embed_tokens, torch.nn.Embedding)
    assert "lm_head" in [path for paths in kernel_summary(model).values() for path in paths]


def test_a_head_that_is_tied_to_an_embedding_of_a_class_of_its_own_stays_dense() -> None:
    """Packed alone it would lie beside the dense table and make the model larger."""
    dense = Gemma3ForCausalLM(Gemma3TextConfig(**{**GEMMA, "tie_word_embeddings": True})).eval()
    models = []
    for head in ({}, {"head": "W8A16"}):
        recipe = {"portable": False, "steps": [{"quantize": {"method": "rtn", "group_size": 16, **head}}]}
        models.append(shrink(copy.deepcopy(dense), recipe, progress=False))
    without, asked = models
    assert asked.lm_head.weight is asked.model.embed_tokens.weight
    assert torch.equal(asked.lm_head.weight, dense.lm_head.weight)
    assert unique_bytes(asked) == unique_bytes(without) < unique_bytes(dense)
    said = "lm_head stays dense: it shares its weight with model.embed_tokens, which is not quantized"
    assert said in asked.shrink_report.notes


@pytest.mark.parametrize(
    ("head", "portable", "message"),
    [
        ("W8A16", True, "portable: false"),
        ("W8A8", False, "W8A16"),
        ("W9A16", False, "W8A16"),
        (8, False, "scheme such as"),
    ],
)
def test_what_cannot_be(head: Any, portable: bool, message: str) -> None:
    recipe = {"portable": portable, "steps": [{"quantize": {"method": "rtn", "group_size": 16, "head": head}}]}
    with pytest.raises(RecipeError, match=message):
        shrink(tiny_llama(tie_word_embeddings=True), recipe, progress=False)


def test_no_head_no_word_for_it() -> None:
    recipe = {"steps": [{"quantize": {"method": "rtn", "group_size": 16, "head": "W8A16"}}]}
    with pytest.raises(RecipeError, match="no output head"):
        shrink(tiny_llama().model, recipe, progress=False)
