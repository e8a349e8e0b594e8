from __future__ import annotations

import pytest
import torch

from hf_shrink.tuning import divergence
from hf_shrink.tuning.divergence import head_divergence, largest, largest_divergence, logit_divergence, state_error


def reference(rows: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """KL(target || rows) of float64 logits, written out."""
    p, q = target.softmax(-1), rows.softmax(-1)
    return (p * (p / q).log()).sum(-1).mean()


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 100, 10**9])
def test_head_divergence_and_its_gradient(with_bias: bool, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "CHUNK_CPU", chunk)
    draw = torch.Generator().manual_seed(0)
    rows, target = torch.randn(7, 5, generator=draw), torch.randn(7, 5, generator=draw)
    weight, dense = torch.randn(11, 5, generator=draw), torch.randn(11, 5, generator=draw)
    bias = torch.randn(11, generator=draw) if with_bias else None
    rows.requires_grad_()
    found = head_divergence(rows, target, (weight, bias), (dense, bias))
    (3 * found).backward()
    exact = rows.detach().double().requires_grad_()
    shift = 0 if bias is None else bias.double()
    wanted = reference(exact @ weight.double().T + shift, target.double() @ dense.double().T + shift)
    (3 * wanted).backward()
    torch.testing.assert_close(found.double(), wanted)
    torch.testing.assert_close(rows.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


def test_equal_heads_and_rows_are_no_distance_apart() -> None:
    rows, weight = torch.randn(4, 3), torch.randn(9, 3)
    assert float(head_divergence(rows, rows, (weight, None), (weight, None))) == pytest.approx(0, abs=1e-6)
    assert float(logit_divergence(rows, rows)) == pytest.approx(0, abs=1e-6)
    assert float(state_error(rows, rows)) == 0


def test_other_distances() -> None:
    rows, target = torch.randn(4, 6), torch.randn(4, 6)
    torch.testing.assert_close(logit_divergence(rows, target).double(), reference(rows.double(), target.double()))
    assert float(state_error(torch.zeros(4, 6), target)) == pytest.approx(1.0)
    assert float(state_error(rows, torch.zeros(4, 6))) > 1e20  # and not a division by zero


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk", [1, 10**9])
def test_logit_divergence_and_its_gradient(temperature: float, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "ROWS", chunk)
    rows, target = 3 * torch.randn(7, 11), 3 * torch.randn(7, 11)
    found = logit_divergence(rows.requires_grad_(), target, temperature)
    (3 * found).backward()
    exact = rows.detach().double().requires_grad_()
    wanted = temperature**2 * reference(exact / temperature, target.double() / temperature)
    (3 * wanted).backward()
    torch.testing.assert_close(found.double(), wanted)
    torch.testing.assert_close(rows.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("k", [1, 4, 11])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk", [1, 10**9])
def test_the_largest_probabilities_and_the_others_as_one(
    k: int, temperature: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(divergence, "ROWS", chunk)
    rows, target = 3 * torch.randn(7, 11), 3 * torch.randn(7, 11)
    kept = largest(target, k, temperature)
    found = largest_divergence(rows.requires_grad_(), kept, temperature)
    found.backward()
    exact = rows.detach().double().requires_grad_()
    p, q = ((x / temperature).softmax(-1) for x in (target.double(), exact))
    named = p.topk(k).indices
    others = torch.ones_like(p).scatter(-1, named, 0.0)
    pairs = [(p.gather(-1, named), q.gather(-1, named))]
    if k < 11:
        pairs.append(((p * others).sum(-1, keepdim=True), (q * others).sum(-1, keepdim=True)))
    wanted = temperature**2 * sum((a * (a / b).log()).sum(-1) for a, b in pairs).mean()
    wanted.backward()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rows.grad.double(), exact.grad, rtol=1e-3, atol=1e-5)
    assert float(found) <= float(logit_divergence(rows.detach(), target, temperature)) + 1e-5
