"""Which weights a quantize step touches: defaults, targets, ignore, overrides, ties, portability."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from conformance.cases import CASES
from conformance.cases_mixtures import MIXTURES
from tiny import tiny_llama
from tiny_readers import tiny_t5
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from hf_shrink import make_plan, shrink
from hf_shrink.architectures import bind
from hf_shrink.checkpoint.format import quantization_config
from hf_shrink.errors import RecipeError
from hf_shrink.pipeline.targets import Resolved, resolve_schemes
from hf_shrink.plan import Scheme
from hf_shrink.recipe import Recipe
from hf_shrink.runtime import PackedModule


def resolve(model: Any, portable: bool = True, **step: Any) -> Resolved:
    recipe = Recipe.from_dict({"steps": [{"quantize": {"group_size": 16, **step}}]})
    assert recipe.quantize is not None
    return resolve_schemes(model, bind(model), recipe.quantize, portable)


def test_default_is_every_linear_inside_the_blocks() -> None:
    schemes = resolve(tiny_llama()).schemes
    assert len(schemes) == 4 * 7
    assert all(path.startswith("model.layers.") for path in schemes)
    assert set(schemes.values()) == {Scheme(4, True, "group", 16)}


def test_class_target_still_spares_head_and_ties_unless_ignore_is_empty() -> None:
    untied, tied = tiny_llama(), tiny_llama(tie_word_embeddings=True)
    assert "lm_head" not in resolve(untied, targets=["Linear"]).schemes
    assert "lm_head" in resolve(untied, targets=["Linear"], ignore=[]).schemes
    assert "model.embed_tokens" not in resolve(tied, targets=["Linear", "Embedding"]).schemes
    full = resolve(tied, targets=["Linear", "Embedding"], ignore=[]).schemes
    assert full["lm_head"] == full["model.embed_tokens"]


def test_an_ignore_that_matches_nothing_is_noted() -> None:
    """It may be meant for other models, or be misspelt: then what was to stay is rounded."""
    found = resolve(tiny_llama(), ignore=["lm_head", "model.layers.0.mlp.down_porj"])
    assert "quantize.ignore: 'model.layers.0.mlp.down_porj' means no weight" in " ".join(found.notes)
    assert "'lm_head'" not in " ".join(found.notes)


def test_most_specific_override_wins_and_names_its_module() -> None:
    schemes = resolve(
        tiny_llama(),
        overrides={
            "Linear": {"scheme": "W3A16"},
            "re:.*down_proj": {"scheme": "W8A16"},
            "re:.*layers.1.*": {"scheme": "W5A16"},
            "model.layers.1.mlp.down_proj": {"scheme": "W6A16"},
            "lm_head": {"scheme": "W8A16", "strategy": "channel"},
        },
    ).schemes
    bits = {path: scheme.bits for path, scheme in schemes.items()}
    assert bits["model.layers.0.mlp.up_proj"] == 3
    assert bits["model.layers.0.mlp.down_proj"] == 8
    assert bits["model.layers.1.mlp.up_proj"] == 5
    assert bits["model.layers.1.mlp.down_proj"] == 6
    assert schemes["lm_head"] == Scheme(8, True, "channel", None)


def test_explicit_ignore_beats_targets_and_overrides() -> None:
    schemes = resolve(
        tiny_llama(), ignore=["re:.*layers.0.*", "lm_head"], overrides={"lm_head": {"scheme": "W8A16"}}
    ).schemes
    assert "lm_head" not in schemes
    assert not any(".0." in path for path in schemes)
    assert len(schemes) == 3 * 7


def test_targets_and_overrides_that_do_nothing_are_noted() -> None:
    inner, head = "re:.*layers.*", {"lm_head": {"scheme": "W8A16"}}
    for step in ({"ignore": ["lm_head"], "overrides": head}, {"head": "W8A16", "overrides": head, "portable": False}):
        found = resolve(tiny_llama(), **step)
        assert [n for n in found.notes if "quantize.overrides: 'lm_head' changes nothing" in n]
    found = resolve(tiny_llama(tie_word_embeddings=True), targets=[inner, "lm_head", "Embedding"])
    assert [n[:30] for n in found.notes] == ["quantize.targets: 'lm_head' ad", "quantize.targets: 'Embedding' "]
    used = resolve(tiny_llama(), targets=[inner], overrides={**head, "re:.*layers.0.*": {"scheme": "W3A16"}})
    assert not [n for n in used.notes if "nothing" in n] and used.schemes["lm_head"].bits == 8


def test_the_path_of_a_module_means_what_is_inside_it() -> None:
    model = tiny_llama()
    left = resolve(model, ignore=["model.layers.0"]).schemes
    assert len(left) == 3 * 7 and not any(path.startswith("model.layers.0.") for path in left)
    assert list(resolve(model, targets=["model.layers.1.mlp"]).schemes) == [
        f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")
    ]
    # What a checkpoint says to leave alone are the matrices themselves.
    said = [target for target in quantization_config(model, left)["ignore"] if target.startswith("re:")]
    linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear) and path != "lm_head"]
    assert [path for path in linears if any(re.match(t[3:], path) for t in said)] == linears[:7]


def test_an_override_of_a_module_is_for_what_is_quantized_inside_it() -> None:
    overrides = {
        "Linear": {"scheme": "W2A16"},
        "re:.*q_proj": {"scheme": "W3A16"},
        "model.layers.0": {"scheme": "W5A16"},
        "model.layers.0.mlp": {"scheme": "W6A16"},
        "model.layers.0.mlp.up_proj": {"scheme": "W8A16"},
    }
    schemes = resolve(tiny_llama(), portable=False, overrides=overrides).schemes
    assert len(schemes) == 4 * 7
    bits = {path.removeprefix("model.layers."): scheme.bits for path, scheme in schemes.items()}
    assert (bits["0.self_attn.q_proj"], bits["0.mlp.down_proj"], bits["0.mlp.up_proj"]) == (5, 6, 8)
    assert (bits["1.self_attn.q_proj"], bits["1.mlp.up_proj"]) == (3, 2)
    whole = resolve(tiny_llama(tie_word_embeddings=True), overrides={"model": {"scheme": "W8A16"}}).schemes
    assert len(whole) == 4 * 7 and {scheme.bits for scheme in whole.values()} == {8}


def test_an_override_of_a_module_leaves_routers_and_reaches_what_lies_outside_of_the_blocks() -> None:
    step = {"quantize": {"method": "rtn", "group_size": 8, "overrides": {"model.layers.0": {"scheme": "W8A16"}}}}
    mixture = make_plan(MIXTURES["qwen2_moe"](), {"portable": False, "steps": [step]}, progress=False).schemes
    first = {path: scheme.bits for path, scheme in mixture.items() if path.startswith("model.layers.0.")}
    assert "model.layers.0.mlp.experts.1.up_proj" in first and set(first.values()) == {8}
    assert not any("gate" in path.rpartition(".")[2] and "gate_proj" not in path for path in mixture)
    seen = CASES["llava"].build()
    before = [path for path, module in seen.named_modules() if "projector" in path and isinstance(module, nn.Linear)]
    around = before[0].rpartition(".")[0]
    assert before and before[0] not in resolve(seen).schemes
    schemes = resolve(seen, portable=False, overrides={around: {"scheme": "W8A16"}}).schemes
    assert [schemes[path].bits for path in before] == [8] * len(before)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"targets": ["Linaer"]}, "did you mean 'Linear'"),
        ({"targets": ["re:("]}, "not a valid regex"),
        ({"overrides": {"model.layers.9.mlp.up_proj": {}}}, "means no weight"),
        ({"targets": ["lm_head"]}, "matches no weight"),
        ({"targets": ["LlamaMLP"]}, r"only modules that hold some; .* path \('model\.layers\.0\.mlp'\)"),
        ({"ignore": ["LlamaAttention"]}, r"regex such as 're:\.\*self_attn\[\.\]'"),
        ({"overrides": {"re:.*mlp$": {}}}, "only modules that hold some"),
        ({"targets": ["Linear", "LlamaRMSNorm"]}, "'LlamaRMSNorm' means no weight"),
    ],
)
def test_what_matches_nothing_is_an_error(step: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        resolve(tiny_llama(), **step)


def test_group_sizes_are_resolved_and_said() -> None:
    resolved = resolve(tiny_llama(), group_size=128)
    assert resolved.schemes["model.layers.0.mlp.down_proj"].group_size == 80
    assert any("does not divide" in note and "no fast kernel" in note for note in resolved.notes)


def test_portable_asymmetric_agrees_on_one_group_size() -> None:
    resolved = resolve(tiny_llama(), group_size=128, symmetric=False)
    assert {s.group_size for s in resolved.schemes.values()} == {16}  # the largest that divides 48, 96 and 80
    assert any("one group size, 16" in note for note in resolved.notes)
    free = resolve(tiny_llama(), portable=False, group_size=128, symmetric=False)
    assert len(set(free.schemes.values())) > 1


def test_portable_refuses_what_stock_cannot_load_and_says_how_to_go_on() -> None:
    mixed = {"symmetric": False, "overrides": {"re:.*down_proj": {"scheme": "W8A16"}}}
    with pytest.raises(RecipeError, match="portable: false"):
        resolve(tiny_llama(), **mixed)
    assert resolve(tiny_llama(), portable=False, **mixed).schemes
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64))
    with pytest.raises(RecipeError, match="Conv1D"):
        resolve(gpt2)
    assert len(resolve(gpt2, portable=False).schemes) == 2 * 4


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_of_a_class_of_their_own_stay_dense_with_a_note(tied: bool) -> None:
    model: Any = CASES["gemma3_text"].build()
    if tied:
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
    embedding = model.model.embed_tokens.weight.clone()
    shrink(model, "w8-full", progress=False)
    packed = [path for path, module in model.named_modules() if isinstance(module, PackedModule)]
    assert ("lm_head" in packed) is not tied and len(packed) == 4 * 7 + (not tied)
    assert torch.equal(model.model.embed_tokens.weight, embedding) and model.shrink_report.portable
    note = next(note for note in model.shrink_report.notes if "embed_tokens stays dense" in note)
    assert "Gemma3TextScaledWordEmbedding" in note


def test_one_scheme_is_a_remedy_only_where_it_is_one() -> None:
    with pytest.raises(
        RecipeError, match=r"share one scheme\. Use one scheme for all, such as W4A16, or set portable: f"
    ):
        resolve(tiny_llama(), scheme="W4A16", head="W8A16", symmetric=False)
    with pytest.raises(RecipeError, match=r"rounds no inputs to int8\. Set portable: false"):
        resolve(tiny_t5(), scheme="W8A8", group_size=None)
    with pytest.raises(RecipeError, match=r"knows only Linear and Embedding\. Set portable: false"):
        resolve(CASES["gpt2"].build(), overrides={"re:.*c_fc": {"scheme": "W8A16"}})
