"""Dense copies while a model is measured: the same outputs, unpacked once."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_llama

from hf_shrink import shrink
from hf_shrink.evaluation import dense_copies as copies
from hf_shrink.evaluation.dense_copies import dense_copies
from hf_shrink.runtime.linear import CompressedLinear

RECIPE = {"steps": [{"quantize": {"method": "rtn", "group_size": 32}}], "evaluation": {"metrics": []}}
IDS = torch.randint(3, 300, (2, 90), generator=torch.Generator().manual_seed(0))


def packed(dtype: torch.dtype, kernels: bool):
    model = tiny_llama(hidden_size=96, intermediate_size=128, num_hidden_layers=2).to(dtype)
    shrink(model, RECIPE, progress=False)
    for module in model.modules():
        if isinstance(module, CompressedLinear) and kernels:
            module.optimize()
            assert module.kernel is not None
            # The measured limit differs from machine to machine.
            module.kernel.few, module.kernel._few_values = 40, 40 * module.kernel.columns
        elif isinstance(module, CompressedLinear):
            module.restore()
    return model


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_are_what_they_are_without_and_weights_are_unpacked_once(monkeypatch, dtype, kernels):
    model = packed(dtype, kernels)
    linears = [module for module in model.modules() if isinstance(module, CompressedLinear)]
    with torch.no_grad():
        many, few = model(IDS).logits, model(IDS[:1, :30]).logits
        unpacked: list[int] = []
        if kernels:
            real = copies._unpacked
            monkeypatch.setattr(copies, "_unpacked", lambda *args: unpacked.append(1) or real(*args))
        else:
            whole = CompressedLinear._unpack
            monkeypatch.setattr(CompressedLinear, "_unpack", lambda *args: unpacked.append(1) or whole(*args))
        with dense_copies([model]):
            first = model(IDS).logits
            again = model(IDS).logits
            # Few rows go to the kernel, whose rounding is part of what the model gives.
            assert torch.equal(model(IDS[:1, :30]).logits, few)
    assert torch.equal(first, again) and len(unpacked) == len(linears) > 0
    if not kernels:
        assert torch.equal(first, many)
    error = {torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
    assert (first - many).abs().max() <= error * many.abs().max()
    assert not any("forward" in vars(linear) or linear.kept_dense is not None for linear in linears)


def test_only_what_fits_is_copied_and_gradients_go_the_usual_way():
    model = packed(torch.float32, False)
    linears = [module for module in model.modules() if isinstance(module, CompressedLinear)]
    calls: list[int] = []
    for place, linear in enumerate(linears):
        linear.register_forward_hook(lambda *_, place=place: calls.append(place))
    with torch.no_grad():
        expected = model(IDS).logits
        with dense_copies([model], limit=linears[0].numel * 4):
            assert torch.equal(model(IDS).logits, expected)
        with dense_copies([model], limit=0):
            assert torch.equal(model(IDS).logits, expected)
    with dense_copies([model]):
        states = torch.randn(50, linears[0].in_features, requires_grad=True)
        linears[0](states).sum().backward()
        assert states.grad is not None and torch.isfinite(states.grad).all()
    assert len(calls) == 3 * len(linears) + 1, "hooks of the modules run as before"
