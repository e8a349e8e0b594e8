"""A whole search space on tiny models: bytes as written, plans that the pipeline applies, damage as it is."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from tiny import VOCABULARY, tiny_llama
from torch import Tensor
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration

from hf_shrink import shrink
from hf_shrink.architectures import bind
from hf_shrink.architectures.linears import matrix
from hf_shrink.errors import CheckpointError, RecipeError
from hf_shrink.evaluation.size import stored_bytes
from hf_shrink.plan import Plan, Scheme
from hf_shrink.pruning.trials import Trials
from hf_shrink.quantization.base import METHODS, ModelMethod
from hf_shrink.search.blank import blank_sensitivity
from hf_shrink.search.fingerprint import sensitivity_of
from hf_shrink.search.measuring import Space, measure
from hf_shrink.search.options import Group, Problem
from hf_shrink.search.pieces import find_pieces
from hf_shrink.search.problem import make_problem
from hf_shrink.search.sensitivity import Rounding, Sensitivity

SCHEMES = (
    Scheme(2, symmetric=False, group_size=16),
    Scheme(3, group_size=16),
    Scheme(4, group_size=16),
    Scheme(5, strategy="channel", group_size=None),
    Scheme(8, strategy="tensor", group_size=None),
)


def tokens(batches: int = 4, rows: int = 4, length: int = 24) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, VOCABULARY, (rows, length), generator=generator)} for _ in range(batches)]


def quantizable(model: PreTrainedModel) -> set[str]:
    return {path for block in bind(model).blocks for path in block.roles}


def measured(model: PreTrainedModel, space: Space) -> Sensitivity:
    method = METHODS.build("gptq", {})
    assert not isinstance(method, ModelMethod)
    return measure(model, bind(model), space, method, quantizable(model), tokens())


def problem_of(model: PreTrainedModel, space: Space, sensitivity: Sensitivity, **kwargs: Any) -> Problem:
    base = Plan("llama", method="gptq", refit=True, repair=True)
    return make_problem(model, bind(model), space, sensitivity, quantizable(model), base, **kwargs)


def drawn(problem: Problem, generator: random.Random, drops: int = 1) -> tuple[int, ...]:
    """Options at random, links kept; of every set of switches the first that is on stays on."""
    linked = {place for link in problem.links for place in link}
    gone = dict(place for link in generator.sample(problem.links, drops) for place in link)
    on: dict[int, str] = {}
    choice = []
    for number, group in enumerate(problem.groups):
        free = []
        for index, option in enumerate(group.options):
            sets = {s: name for s, names in enumerate(problem.switches) for name in option.needs if name in names}
            if (number, index) not in linked and all(on.get(s, name) == name for s, name in sets.items()):
                free.append((index, sets))
        index, sets = generator.choice(free)
        index = gone.get(number, index)
        on |= {} if number in gone else sets
        choice.append(index)
    return tuple(choice)


@pytest.fixture(scope="module")
def uneven() -> tuple[Space, Sensitivity]:
    space = Space(SCHEMES, portable=False)
    return space, measured(tiny_llama(tie_word_embeddings=True), space)


@pytest.mark.parametrize(("seed", "dtype"), [(0, None), (1, torch.bfloat16), (2, torch.bfloat16)])
def test_bytes_are_those_of_the_folder(
    uneven: tuple[Space, Sensitivity], seed: int, dtype: torch.dtype | None, tmp_path: Path
) -> None:
    """Mixed schemes, cut heads and channels, a block gone, the tied embedding packed: never more than predicted."""
    model = tiny_llama(tie_word_embeddings=True)
    problem = problem_of(model, *uneven, dtype=dtype)
    choice = drawn(problem, random.Random(seed))
    plan = problem.plan(choice)
    assert plan.schemes and plan.stacks["decoder"].blocks and len(plan.stacks["decoder"].kept) == 3
    if dtype is not None:
        model.to(dtype)
    shrink(model, plan, calibration=tokens(), progress=False)
    model.save_pretrained(tmp_path)
    predicted, written = problem.cost(choice).bytes, stored_bytes(tmp_path)
    # Offsets have as many digits as in the dense file, which shows in one as small as this.
    assert written <= predicted <= 1.001 * written + 4 * len(model.state_dict())


def test_the_dense_model_is_the_first_option_of_all(uneven: tuple[Space, Sensitivity], tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    problem = problem_of(model, *uneven)
    first = (0,) * len(problem.groups)
    assert problem.damage(first) == 0
    assert problem.plan(first) == Plan("llama", refit=False)
    model.save_pretrained(tmp_path)
    written = stored_bytes(tmp_path)
    assert written <= problem.dense.bytes <= 1.005 * written
    assert problem.dense.cache == 4 * 2 * 3 * 16 * 4  # blocks, key and value, KV groups, head size, float32


def test_portable_plans_have_equal_blocks(tmp_path: Path) -> None:
    model = tiny_llama()
    space = Space((Scheme(3, group_size=16), Scheme(4, group_size=16)))
    problem = problem_of(model, space, blank_sensitivity(model, bind(model), space, quantizable(model)))
    assert not any("embed" in group.name for group in problem.groups)
    for seed in range(20):
        blocks = problem.plan(drawn(problem, random.Random(seed))).stacks["decoder"].blocks
        assert len({None if b.channels is None else len(b.channels) for b in blocks.values()}) <= 1
    shrink(model, problem.plan(drawn(problem, random.Random(1))), calibration=tokens(), progress=False)
    assert model.shrink_report.portable


def test_a_block_without_any_part_goes_as_a_whole(uneven: tuple[Space, Sensitivity]) -> None:
    problem = problem_of(tiny_llama(tie_word_embeddings=True), *uneven)
    choice = [0] * len(problem.groups)
    for number, group in enumerate(problem.groups):
        if group.block == 2:
            choice[number] = next(i for i, option in enumerate(group.options) if option.change.block.removed)
    plan = problem.plan(choice)
    assert plan.stacks["decoder"].kept == (0, 1, 3) and not plan.stacks["decoder"].blocks
    assert plan.repair and not plan.refit


def test_what_is_left_is_repaired_where_parts_go_alone(uneven: tuple[Space, Sensitivity]) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    problem = problem_of(model, *uneven)
    group = next(i for i, group in enumerate(problem.groups) if group.name == "model.layers.2 mlp")
    plans = {}
    for index, option in enumerate(problem.groups[group].options):
        choice = [0] * len(problem.groups)
        choice[group] = index
        kind = "cut" if option.change.block.channels else "removed" if option.change.block.removed else "whole"
        if not option.change.dropped:
            plans[kind] = problem.plan(choice)
    assert {kind: plan.repair for kind, plan in plans.items()} == {"whole": False, "cut": False, "removed": True}
    shrink(model, plans["removed"], calibration=tokens(), progress=False)
    assert any("refitted to the dense model's residual stream" in note for note in model.shrink_report.notes)


def test_choices_that_break_a_link_or_a_switch_are_refused(uneven: tuple[Space, Sensitivity]) -> None:
    problem = problem_of(tiny_llama(tie_word_embeddings=True), *uneven)
    (group, option), *_ = problem.links[0]
    broken = [0] * len(problem.groups)
    broken[group] = option
    with pytest.raises(RecipeError, match="not one that the model allows"):
        problem.plan(broken)


def test_predicted_damage_ranks_as_the_true_one_does(uneven: tuple[Space, Sensitivity]) -> None:
    """Every piece under every scheme, against the divergence with that piece rounded as the method rounds it."""
    model = tiny_llama(tie_word_embeddings=True)
    space, sensitivity = uneven
    binding, data = bind(model), tokens()
    trials = Trials(model, binding, data, seed=0)
    method = METHODS.build("rtn", {})
    assert not isinstance(method, ModelMethod)
    predicted, true = [], []
    for piece in find_pieces(binding, quantizable(model)):
        for scheme in (space.schemes[0], space.schemes[2], space.schemes[4]):
            changes = []
            for module in piece.modules.values():
                weight = matrix(module)
                changes.append((weight, method.solve(weight, scheme, None, scale_dtype=torch.float32).dequantized()))
            predicted.append(sensitivity.rounding[piece.name].damage[scheme])
            true.append(trials.divergence_of(changes, piece.key))
    assert spearmanr(predicted, true).statistic > 0.9


def test_measurements_are_found_again_by_what_they_are_of(
    uneven: tuple[Space, Sensitivity], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    space, sensitivity = uneven
    asked: list[Sequence[Any]] = []

    def once(*args: Any, **kwargs: Any) -> Sensitivity:
        asked.append(args)
        return sensitivity

    monkeypatch.setattr("hf_shrink.search.fingerprint.measure", once)
    arguments = bind(model), space, METHODS.build("gptq", {}), quantizable(model)
    sensitivity_of(model, *arguments, tokens(), tmp_path)  # type: ignore[arg-type]
    again = sensitivity_of(model, *arguments, tokens(), tmp_path)  # type: ignore[arg-type]
    assert len(asked) == 1
    assert problem_of(model, space, again) == problem_of(model, space, sensitivity)
    sensitivity_of(model, *arguments, tokens(2), tmp_path)  # type: ignore[arg-type]
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    sensitivity_of(model, *arguments, tokens(), tmp_path)  # type: ignore[arg-type]
    assert len(asked) == 3
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 1:] += 1
    sensitivity_of(model, *arguments, tokens(), tmp_path)  # type: ignore[arg-type]
    model.config.hidden_act = "gelu"  # the same weights compute something else
    sensitivity_of(model, *arguments, tokens(), tmp_path)  # type: ignore[arg-type]
    assert len(asked) == 5
    shorter = [{"input_ids": batch["input_ids"].view(8, 12)} for batch in tokens()]
    sensitivity_of(model, *arguments, shorter, tmp_path)  # type: ignore[arg-type]
    joined = [{"input_ids": torch.cat([batch["input_ids"] for batch in tokens()])}]
    sensitivity_of(model, *arguments, joined, tmp_path)  # type: ignore[arg-type]
    assert len(asked) == 7
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="delete it"):
        sensitivity_of(model, *arguments, tokens(), tmp_path)  # type: ignore[arg-type]


def test_weights_that_stock_takes_in_one_scheme_only_get_one() -> None:
    """T5's initialisation asks for a weight, so stock makes it dense while loading, which takes one scheme for all."""
    sizes = {"d_model": 48, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 3, "vocab_size": 64}
    model = T5ForConditionalGeneration(T5Config(**sizes, feed_forward_proj="gated-gelu")).eval()
    binding = bind(model)
    schemes = (Scheme(3, group_size=32), Scheme(4, group_size=32))
    space = Space(schemes, width=False, depth=False)
    names = [piece.name for piece in find_pieces(binding, quantizable(model))]
    sensitivity = Sensitivity({name: Rounding({schemes[0]: 2.0, schemes[1]: 1.0}) for name in names}, {}, {}, {})
    problem = make_problem(model, binding, space, sensitivity, quantizable(model), Plan("t5", method="rtn"))
    assert problem.switches == (("weights: W3 g24", "weights: W4 g24"),)
    bits = [{s.bits for option in group.options for s in option.change.schemes.values()} for group in problem.groups]
    assert all(found == {3, 4} for found in bits)

    def first(bits: int, group: Group) -> int:
        return next(i for i, option in enumerate(group.options) if f"weights: W{bits} g24" in option.needs)

    assert not problem.allowed([first(3 + number % 2, group) for number, group in enumerate(problem.groups)])
    choice = [first(3, group) for group in problem.groups]
    shrink(model, problem.plan(choice), progress=False)
    assert model.shrink_report.portable
