"""Types that are refused, because they would come out wrong without an error."""

from __future__ import annotations

import pytest
from transformers import RwkvConfig, RwkvForCausalLM

from hf_shrink import make_plan, shrink
from hf_shrink.errors import ArchitectureError


@pytest.mark.parametrize("work", [shrink, make_plan])
def test_a_forward_that_changes_weights_in_place(work) -> None:
    config = RwkvConfig(
        vocab_size=32, hidden_size=16, attention_hidden_size=16, intermediate_size=32, num_hidden_layers=2
    )
    with pytest.raises(ArchitectureError, match="divides weights in place"):
        work(RwkvForCausalLM(config), {"steps": [{"quantize": {"method": "rtn"}}]}, progress=False)
