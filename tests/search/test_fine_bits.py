"""What more than 4 bits cost, which the method itself is not asked about."""

from __future__ import annotations

import pytest
import torch
from tiny import VOCABULARY, tiny_llama

from hf_shrink.architectures import bind
from hf_shrink.plan import Scheme
from hf_shrink.quantization.base import METHODS
from hf_shrink.search import measuring, rounding

SCHEMES = tuple(Scheme(bits, group_size=16) for bits in (4, 5, 6, 8))


def damages() -> dict[int, float]:
    """Nats by bits, over all pieces."""
    generator = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(3, VOCABULARY, (4, 24), generator=generator)} for _ in range(4)]
    model = tiny_llama()
    binding = bind(model)
    paths = {path for block in binding.blocks for path in block.roles}
    space = measuring.Space(SCHEMES, width=False, depth=False, embeddings=False)
    with torch.no_grad():
        found = measuring.measure(model, binding, space, METHODS.build("gptq", {}), paths, batches)
    return {s.bits: sum(piece.damage[s] for piece in found.rounding.values()) for s in SCHEMES}


def test_fine_bits_cost_about_what_the_method_makes_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that 5 bits are not compared, rounded plainly, with 4 bits by a better method."""
    predicted = damages()
    monkeypatch.setattr(rounding, "COARSE", 8)
    asked = damages()
    assert predicted[4] == pytest.approx(asked[4], rel=1e-6)
    for bits in (5, 6, 8):
        assert asked[bits] / 1.2 < predicted[bits] < 1.2 * asked[bits]
