"""Plans and schemes: JSON round trip, group sizes, stored bytes."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from hf_shrink.errors import RecipeError
from hf_shrink.plan import BlockPlan, Plan, Scheme, StackPlan
from hf_shrink.quantization.rtn import RTN
from hf_shrink.runtime.linear import CompressedLinear

PLAN = Plan(
    model_type="llama",
    stacks={"decoder": StackPlan((0, 2, 3), {2: BlockPlan((0, 1, 4, 5), (1, 3, 5)), 0: BlockPlan(channels=(7,))})},
    schemes={"model.layers.2.mlp.up_proj": Scheme(4, True, "group", 32)},
    method="gptq",
    options={"damping": 0.05},
    damage={"decoder.1": 0.25},
)


def test_json_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    text = PLAN.to_json(path)
    assert Plan.from_json(text) == PLAN == Plan.from_json(path) == Plan.from_json(json.loads(text))


def test_kept_units_are_written_as_ranges_and_read_as_lists_too() -> None:
    block = BlockPlan(
        (0, 1, 2, 5), (1, 3), (2, 3), (0, 2), ((1, 0, 0.5),), ("mlp",), ((0, 1, 2, 3), (0, 1, 4, 6), (4, 5, 6, 7))
    )
    plan = replace(PLAN, stacks={"decoder": StackPlan((0, 1, 2), {1: block, 2: BlockPlan(channels=())})})
    said = json.loads(plan.to_json())["stacks"]["decoder"]
    assert said["kept"] == "0-2" and said["blocks"]["2"] == {"channels": ""}
    assert said["blocks"]["1"]["query_heads"] == "0-2,5"
    assert said["blocks"]["1"]["expert_channels"] == ["0-3", "0-1,4,6", "4-7"]
    assert Plan.from_json(plan.to_json()) == plan
    lists = {"plan_format": 1, "model_type": "llama", "stacks": {"a": {"kept": [0, 2], "blocks": {"2": asdict(block)}}}}
    assert Plan.from_json({**lists, "schemes": {}}).stacks["a"] == StackPlan((0, 2), {2: block})


@pytest.mark.parametrize("said", ["1,0", "0-2,2", "3-1", "1-2-3", "a", "-1", "0,,1"])
def test_units_that_are_no_ranges_are_refused(said: str) -> None:
    bad = json.loads(PLAN.to_json())
    bad["stacks"]["decoder"]["blocks"]["0"]["channels"] = said
    with pytest.raises(RecipeError, match="such as '0-2,5'"):
        Plan.from_json(bad)


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("refit", "no", "refit must be true or false, not 'no'"),
        ("repair", 1, "repair must be true or false"),
        ("starved_experts", "foo", "unknown starved_experts 'foo'"),
        ("dtype", "float8", "unknown dtype 'float8'; did you mean 'float"),
        ("formats", {"a": "NF5"}, "unknown format 'NF5'; did you mean 'NF4'"),
        ("formats", [], "formats must be a mapping"),
        ("tune", "best", "tune must be a mapping"),
        ("transforms", "awq", r"transforms is a list, for example \[awq\]"),
        ("method", 4, "method is a name such as gptq"),
        ("schemes", [], "not a plan"),
        ("schemes", {"a.b": {"bits": 4.0}}, "schemes of a.b: weights can have 2 to 8 bits, not 4.0, a whole number"),
        ("schemes", {"a.b": {"bits": "4"}}, "not '4', a whole number"),
        ("schemes", {"a.b": {"bits": 4, "symmetric": "false"}}, "a.b: symmetric must be true or false, not 'false'"),
        ("schemes", {"a.b": {"bits": 8, "activation_symmetric": "no"}}, "activation_symmetric must be true or false"),
        ("schemes", {"a.b": {"bits": 4, "activation_bits": 16.0}}, "no scheme has 4-bit int weights with 16.0-bit"),
        ("schemes", {"a.b": {"symmetric": True}}, "schemes of a.b: .*missing.*'bits'"),
        (
            "stacks",
            {"s": {"kept": "0", "blocks": {"x": {}}}},
            "named by their numbers in the source, not 'x'",
        ),
        ("stacks", {"s": {"kept": [0.0], "blocks": {}}}, "kept cannot be"),
        ("stacks", {"s": {"kept": "0", "blocks": {"0": {"channels": ["a"]}}}}, "channels cannot be"),
        ("stacks", {"s": {"kept": "0", "blocks": {"0": {"channels": [True]}}}}, "channels are whole numbers"),
        ("stacks", {"s": {"kept": "0", "blocks": {"0": {"removed": "mlp"}}}}, "removed cannot be mlp"),
        ("stacks", {"s": {"kept": "0", "blocks": {"0": {"expert_channels": "0-7"}}}}, "expert_channels cannot be 0-7"),
        ("stacks", {"s": {"kept": "0", "blocks": {"0": {"merges": [[1, 0]]}}}}, "removed expert, kept expert, share"),
        ("weights", {"method": "wanda", "amounts": {}, "refit": "no"}, "weights.refit must be true or false"),
        ("hidden", {"stack": "s", "width": 8.0, "method": "pca"}, "hidden.width must be a whole number"),
        ("hidden", {"stack": "s", "width": 8, "method": "pca", "untie": 0}, "hidden.untie must be true or false"),
        ("vocabulary", {"rows": 9, "kept": [0, 1], "tokenizer": "x"}, "kept text such as"),
    ],
)
def test_values_of_another_kind_are_refused(key: str, value: object, match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        Plan.from_json({**json.loads(PLAN.to_json()), key: value})


@pytest.mark.parametrize("bad", ["{", "{}", '{"plan_format": 99}', '{"plan_format": 1, "stacks": 3}'])
def test_not_a_plan(bad: str) -> None:
    with pytest.raises(RecipeError, match="not a plan"):
        Plan.from_json(bad)


def test_a_file_that_holds_no_plan(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[1, 2]")
    with pytest.raises(RecipeError, match="not a plan"):
        Plan.from_json(tmp_path / "list.json")


def test_summary_names_what_is_kept_and_how_it_is_stored() -> None:
    text = PLAN.summary()
    assert "3 blocks kept (0, 2-3)" in text
    assert "query heads 4, channels 3" in text
    assert "1 weights W4A16 g32 symmetric by gptq" in text
    assert Plan("llama").summary() == "nothing to do"


def test_summary_says_what_is_done_before_and_after_rounding() -> None:
    text = replace(PLAN, transforms=("smooth", "rotate"), tune={"steps": 7}, effort="best").summary()
    assert "effort best = method: gptq, transforms: [smooth, rotate], tune: {steps: 7}" in text
    assert "options of gptq: damping: 0.05" in text
    assert "before rounding, folded into the weights: smooth, rotate" in text
    assert "after rounding, scales, zero points and norms are tuned: steps: 7" in text
    plain = replace(PLAN, options={}).summary()
    for word in ("effort", "options", "before rounding", "after rounding"):
        assert word not in plain


def test_work_round_trips_and_older_plans_without_it_are_read() -> None:
    plan = replace(PLAN, transforms=("smooth",), tune={"steps": 7}, effort="best")
    assert Plan.from_json(plan.to_json()) == plan
    older = json.loads(PLAN.to_json())
    for key in ("transforms", "tune", "effort"):
        del older[key]
    assert Plan.from_json(older) == PLAN


@pytest.mark.parametrize(
    ("width", "asked", "got"),
    [
        (4096, 128, 128),
        (576, 128, 64),
        (96, 128, 32),
        (80, 128, 80),
        (80, 64, 40),
        (50, 32, 25),
        (7, 128, 7),
        (97, 64, 1),
    ],
)
def test_group_size_becomes_the_nearest_that_divides(width: int, asked: int, got: int) -> None:
    resolved = Scheme(4, True, "group", asked).for_width(width).group_size
    assert resolved == got
    assert width % got == 0


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("strategy", "group"), [("tensor", None), ("channel", None), ("group", 32)])
def test_stored_bytes_equal_the_packed_tensors(bits: int, symmetric: bool, strategy: str, group: int | None) -> None:
    scheme = Scheme(bits, symmetric, strategy, group)  # type: ignore[arg-type]
    solved = RTN().solve(torch.randn(24, 96), scheme, None, scale_dtype=torch.bfloat16)
    packed = CompressedLinear.from_quantized(solved, None)
    assert sum(t.numel() * t.element_size() for t in packed.state_dict().values()) == scheme.stored_bytes(24, 96)


@pytest.mark.parametrize("bits", [0, 1, 9])
def test_impossible_bits(bits: int) -> None:
    with pytest.raises(RecipeError, match="2 to 8 bits"):
        Scheme(bits)


def test_names_of_schemes_both_ways():
    for name in ("W2A16", "W8A16", "W8A8", "FP8A16"):
        kind = Scheme.kind_of(name.lower())
        form = ("channel", None) if kind.by_channel else ("group", 16)
        assert Scheme(kind.bits, True, *form, kind.type, kind.activation_bits).name == name
    assert Scheme.bits_of("W8A8") == Scheme.bits_of("FP8A16") == 8
    for wrong, near in (("W9A16", "W8A16"), ("W8A4", "W8A"), ("FP8", "FP8A16"), ("FP8A8", "FP8A16")):
        with pytest.raises(RecipeError, match=f"did you mean '{near}"):
            Scheme.kind_of(wrong)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"bits": 4, "activation_bits": 8}, "no scheme has 4-bit int weights with 8-bit"),
        ({"bits": 8, "type": "float", "activation_bits": 8}, "no scheme"),
        ({"bits": 8, "type": "float"}, "FP8A16 is symmetric with one scale per channel"),
        ({"bits": 8, "activation_bits": 8, "strategy": "tensor", "group_size": None}, "W8A8 is symmetric"),
        ({"bits": 8, "activation_bits": 8, "strategy": "channel", "group_size": None, "symmetric": False}, "W8A8 is"),
        ({"bits": 8, "activation_symmetric": True}, "activation_symmetric goes with W8A8"),
    ],
)
def test_forms_that_do_not_exist(fields, said):
    with pytest.raises(RecipeError, match=said):
        Scheme(**fields)


def test_plans_with_every_type_survive_json_and_old_ones_still_load():
    int8 = Scheme(8, True, "channel", None, "int", 8)
    plan = Plan("llama", schemes={"a": int8, "b": Scheme(8, True, "channel", None, "float")}, method="rtn")
    assert Plan.from_json(plan.to_json()) == plan
    assert "1 weights W8A8 per channel symmetric by rtn, inputs in int8 per token" in plan.summary()
    assert "FP8A16 per channel" in plan.summary()
    plain = Plan("llama", schemes={"a": Scheme(8, True, "channel", None, "int", 8, True)}, method="rtn")
    assert Plan.from_json(plan.to_json()) == plan
    assert "inputs in int8 per token without zero points" in plain.summary()
    old = json.loads(plan.to_json())
    old["schemes"] = {"a": {"bits": 4, "symmetric": True, "strategy": "group", "group_size": 32}}
    assert Plan.from_json(old).schemes == {"a": Scheme(4, True, "group", 32)}
    assert int8.stored_bytes(10, 48) == 10 * 48 + 10 * 2
