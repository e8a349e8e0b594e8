"""Bytes of files, counted before there are any."""

from __future__ import annotations

from pathlib import Path

import pytest
from conformance.cases import CASES
from conformance.cases_mixtures import MIXTURES

from hf_shrink.evaluation.size import stored_bytes
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
