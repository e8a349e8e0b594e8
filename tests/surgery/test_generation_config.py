"""What a generation config says of blocks and heads, after some of them are gone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conformance.cases_encoders import CASES
from transformers import GenerationConfig, PreTrainedModel

from hf_shrink import shrink_checkpoint
from hf_shrink.plan import BlockPlan, Plan, StackPlan
from hf_shrink.surgery import apply_structure

EVERY = (0, 1, 2, 3)


def whisper() -> PreTrainedModel:
    model = CASES["whisper"].build()
    model.generation_config._from_model_config = False  # else transformers does not read it back
    model.generation_config.alignment_heads = [[0, 2], [2, 1], [3, 0], [3, 3]]
    model.generation_config.no_timestamps_token_id, model.generation_config.is_multilingual = 299, False
    return model


def plan(kept: tuple[int, ...] = EVERY, **blocks: BlockPlan) -> Plan:
    return Plan("whisper", {"decoder": StackPlan(kept, {int(name[1:]): block for name, block in blocks.items()})})


def word_timestamps(model: PreTrainedModel) -> torch.Tensor:
    made = model.generate(
        CASES["whisper"].inputs()["input_features"][:1],
        return_token_timestamps=True,
        return_timestamps=True,
        max_new_tokens=4,
        return_dict_in_generate=True,
    )
    return made["token_timestamps"]


@pytest.mark.parametrize(
    ("wanted", "left"),
    [
        (plan(b1=BlockPlan(query_heads=(1,))), [[0, 2], [2, 1], [3, 0], [3, 3]]),
        (plan((0, 1, 3)), [[0, 2], [2, 0], [2, 3]]),
        (plan((0, 2, 3), b0=BlockPlan(cross_heads=(0, 2)), b3=BlockPlan(cross_heads=(1, 3))), [[0, 1], [1, 1], [2, 1]]),
    ],
)
def test_heads_are_named_by_their_new_numbers(wanted: Plan, left: list[list[int]]) -> None:
    model = whisper()
    apply_structure(model, wanted)
    assert model.generation_config.alignment_heads == left
    assert word_timestamps(model).isfinite().all()


@pytest.mark.parametrize("wanted", [plan((1,)), plan(b1=BlockPlan(removed=("cross_attention",)))])
def test_without_such_heads_transformers_says_what_it_misses(wanted: Plan) -> None:
    model = whisper()
    apply_structure(model, wanted)
    with pytest.raises(ValueError, match="no `alignment_heads`"):
        word_timestamps(model)


def test_a_run_writes_them_and_notes_those_that_are_gone(tmp_path: Path) -> None:
    whisper().save_pretrained(tmp_path / "dense")
    wanted = replace(plan((0, 1, 3)), refit=False)
    report = shrink_checkpoint(tmp_path / "dense", tmp_path / "small", wanted, progress=False)
    assert "the plan leaves 3 of 4 pairs in alignment_heads" in " ".join(report.notes)
    assert GenerationConfig.from_pretrained(tmp_path / "small").alignment_heads == [[0, 2], [2, 0], [2, 3]]
