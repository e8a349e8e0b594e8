"""What the options of models other than Llama's take, and which of them there are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conformance.cases import CASES
from conformance.cases_encoders import CASES as ENCODERS
from conformance.cases_mixtures import MIXTURES, MORE
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
)

from hf_shrink import shrink
from hf_shrink.architectures import bind
from hf_shrink.evaluation.size import stored_bytes
from hf_shrink.pipeline.searching import Searching
from hf_shrink.plan import Plan
from hf_shrink.progress import quiet
from hf_shrink.recipe import Recipe
from hf_shrink.scheme import Scheme
from hf_shrink.search.blank import blank_sensitivity
from hf_shrink.search.fisher import output_gradients
from hf_shrink.search.measuring import Space
from hf_shrink.search.options import Problem
from hf_shrink.search.outer import outer_weights
from hf_shrink.search.problem import make_problem

SIZES = {"vocab_size": 1024, "tie_word_embeddings": True}
TIED = {
    "phi": lambda: PhiForCausalLM(
        PhiConfig(**SIZES, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    ),
    "gptj": lambda: GPTJForCausalLM(GPTJConfig(**SIZES, n_embd=32, n_layer=2, n_head=4, n_positions=32, rotary_dim=4)),
}

BUILDS = {**{name: case.build for name, case in {**CASES, **ENCODERS}.items()}, **MIXTURES, **MORE}


def problem_of(model: PreTrainedModel) -> Problem:
    binding, space = bind(model), Space((Scheme(4, group_size=16),), portable=False)
    paths = {path for block in binding.blocks for path in block.roles}
    measured = blank_sensitivity(model, binding, space, paths)
    return make_problem(model, binding, space, measured, paths, Plan(model.config.model_type, method="rtn"))


@pytest.mark.parametrize("name", TIED)
def test_the_bias_of_a_tied_head_is_counted(name: str, tmp_path: Path) -> None:
    model = TIED[name]().eval()
    model.save_pretrained(tmp_path / "dense")
    budget = round(0.4 * stored_bytes(tmp_path / "dense"))
    search = {"group_size": 16, "effort": "fast", "generations": 0, "bits": [4, 8]}
    recipe = {"portable": False, "budget": {"bytes": budget}, "search": search}
    data = [{"input_ids": torch.arange(3, 51).view(4, 12)}]
    shrink(model, recipe, calibration=data, progress=False)
    model.save_pretrained(tmp_path / "small")
    written = stored_bytes(tmp_path / "small")
    assert written <= budget
    assert written == pytest.approx(model.shrink_record.plan.search["bytes"], rel=0.005)


@pytest.mark.parametrize("name", ["gemma3_text", "gemma3"])
def test_the_first_layer_of_each_kind_stays(name: str) -> None:
    """Of a vision-language model too, whose config keeps the kinds in that of the text."""
    model = CASES[name].build()
    text = model.config.get_text_config()
    first = {text.layer_types.index(kind) for kind in text.layer_types}
    assert len(first) == 2
    gone = {
        group.block
        for group in problem_of(model).groups
        for option in group.options
        if group.stack in ("decoder", "text") and (option.change.dropped or option.change.block.removed)
    }
    assert gone == set(range(text.num_hidden_layers)) - first


@pytest.mark.parametrize("name", BUILDS)
def test_the_dense_model_is_always_allowed(name: str) -> None:
    """The solver relies on it. Encoders and decoders that read one config key have to agree."""
    bits = [] if name.startswith("gpt2") else [4]  # its Conv1D are packed in no portable format
    search = {"bits": bits, "group_size": 16, "effort": "fast"}
    asked = Recipe.from_dict({"budget": {"bytes": "70%"}, "search": search})
    with Searching.on(BUILDS[name](), asked, (), 0, quiet) as searching:
        blank = blank_sensitivity(searching.model, searching.binding, searching.space, searching.quantizable)
        problem = searching.problem(blank, timed=False)
    assert problem.allowed((0,) * len(problem.groups))
    names = [name for switch in problem.switches for name in switch]
    assert len(names) == len(set(names))


def test_a_model_of_two_towers_has_no_ends() -> None:
    assert outer_weights(ENCODERS["clip"].build()) == ()


@pytest.mark.parametrize("name", ["falcon_multi_query", "falcon_grouped", "falcon_alibi"])
def test_gradients_of_outputs_that_the_model_adds_to_in_place(name: str) -> None:
    """Attention and MLP are added to one residual, so the gradients of what they put out are the same."""
    model = CASES[name].build()
    paths = [f"transformer.h.2.{end}" for end in ("self_attention.dense", "mlp.dense_4h_to_h")]
    matrices = {path: model.get_submodule(path) for path in paths}
    blocks = [block.module for block in bind(model).blocks]
    found = output_gradients(model, blocks, matrices, [CASES[name].inputs()], 0, quiet).outputs
    attention, mlp = (found[path] for path in paths)
    assert attention.rows.min() > 0
    assert torch.allclose(attention.rows, mlp.rows) and torch.allclose(attention.tokens[0], mlp.tokens[0])


def test_a_block_stays_without_any_part_where_depth_is_fixed(tmp_path: Path) -> None:
    sizes = {"vocab_size": 300, "n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 64}
    model = GPT2LMHeadModel(GPT2Config(**sizes, scale_attn_by_inverse_layer_idx=True)).eval()
    problem = problem_of(model)
    choice = [0] * len(problem.groups)
    for number, group in enumerate(problem.groups):
        if group.block == 2:
            choice[number] = next(i for i, option in enumerate(group.options) if option.change.block.removed)
    plan = problem.plan(choice)
    assert plan.stacks["decoder"].kept == (0, 1, 2)
    assert set(plan.stacks["decoder"].blocks[2].removed or ()) == {"attention", "mlp"}
    shrink(model, plan, calibration=[CASES["gpt2"].inputs()], progress=False)
    model.save_pretrained(tmp_path)
    written = stored_bytes(tmp_path)
    assert written <= problem.cost(choice).bytes <= 1.01 * written
