"""Bytes of files, counted before there are any."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conformance.cases import CASES
from conformance.cases_mixtures import MIXTURES, MORE

from hf_shrink.checkpoint.loaded_dtypes import loaded_dtypes
from hf_shrink.evaluation.size import stored_bytes
from hf_shrink.residence import cast
from hf_shrink.runtime.experts import separate_experts
from hf_shrink.search.storage import FILE, Storage

BUILDS = {"mixtral": MIXTURES["mixtral"], "qwen3_moe": MIXTURES["qwen3_moe"], "llama": CASES["llama"].build}


@pytest.mark.parametrize("name", BUILDS)
def test_a_file_is_never_larger_than_what_was_counted(name: str, tmp_path: Path) -> None:
    """Experts are counted one by one, under the names that transformers gives them in files."""
    model = BUILDS[name]()
    model.save_pretrained(tmp_path)
    separate_experts(model)
    counted = Storage(model)
    found = FILE + counted.dense(counted.state)
    assert stored_bytes(tmp_path) <= found <= 1.005 * stored_bytes(tmp_path)


def test_what_stays_in_float32_is_counted_so() -> None:
    model = MORE["glm4_moe"]()
    counted = Storage(model, torch.bfloat16)
    expected = {name: counted.dtype_of(tensor, name) for name, tensor in counted.state.items()}
    one, two = (counted.dense([f"model.layers.1.mlp.{name}.weight"]) for name in ("gate", "shared_experts.up_proj"))
    cast(model, torch.bfloat16, loaded_dtypes(model, torch.bfloat16))
    assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == expected
    assert set(expected.values()) == {torch.bfloat16, torch.float32}
    assert one > 4 * 6 * 48 and 2 * 48 * 48 < two < 4 * 48 * 48
