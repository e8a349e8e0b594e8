"""Zeros stay zero while a model is trained, in loops of one's own and by transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_llama
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from hf_shrink import RecipeError, keep_zeros, prune_weights


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 3))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5) -> None:
    draw = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x, y = torch.randn(16, 12, generator=draw), torch.randn(16, 3, generator=draw)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
    "adam with decay in the gradient": lambda p: torch.optim.Adam(p, lr=0.05, weight_decay=0.1, amsgrad=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("late", [False, True])
def test_zeros_stay_and_the_rest_is_trained(name: str, late: bool) -> None:
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    if late:  # momenta are there already when the zeros come
        train(model, optimizer)
    prune_weights(model, sparsity=0.5)
    zeros = {n: p == 0 for n, p in model.named_parameters() if p.dim() == 2}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with keep_zeros(model) as keeper:
        train(model, optimizer)
        assert set(keeper.kept) == set(zeros)
    for n, p in model.named_parameters():
        if n in zeros:
            assert torch.equal(p == 0, zeros[n]), n
        assert not torch.equal(p, before[n])
    train(model, optimizer)  # let go
    assert any((model.get_parameter(n)[gone] != 0).any() for n, gone in zeros.items())


def test_it_is_what_masking_by_hand_gives() -> None:
    found = []
    for by_hand in (True, False):
        model = net()
        prune_weights(model, sparsity=0.4)
        masks = [p.detach() != 0 for p in model.parameters()]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if by_hand:
            for _ in range(4):
                train(model, optimizer, 1)
                with torch.no_grad():
                    for p, mask in zip(model.parameters(), masks, strict=True):
                        p.mul_(mask)
        else:
            with keep_zeros(model):
                for _ in range(4):
                    train(model, optimizer, 1)
        found.append(list(model.parameters()))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_of_zeros_are_zero_and_other_models_are_left_alone() -> None:
    model, other = net(), net()
    prune_weights(model, sparsity=0.5)
    with keep_zeros(model):
        (model(torch.ones(1, 12)) - 1).square().sum().backward()
        weight = model[0].weight
        assert (weight.grad[weight == 0] == 0).all() and (weight.grad != 0).any()
        optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
        with torch.no_grad():
            other[0].weight[0] = 0.0
        train(other, optimizer)
        assert (other[0].weight[0] != 0).any()


def test_more_zeros_later_and_none_in_new_weights() -> None:
    model = net()
    prune_weights(model, sparsity=0.3)
    model.append(nn.Linear(3, 3))
    nn.init.zeros_(model[-1].weight)  # as LoRA's B
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with keep_zeros(model) as keeper:
        assert "3.weight" not in keeper.kept
        train(model, optimizer)
        prune_weights(model, sparsity=0.6, targets=["0"])
        keeper.update()
        train(model, optimizer)
        assert keeper.sparsity()["0.weight"] == pytest.approx(0.6, abs=0.01)
        assert (model[0].weight == 0).float().mean() == pytest.approx(0.6, abs=0.01)
        assert (model[2].weight == 0).float().mean() == pytest.approx(0.3, abs=0.01)
        with torch.no_grad():
            model[0].weight.fill_(1.0)
        keeper.apply()
        assert (model[0].weight == 0).float().mean() == pytest.approx(0.6, abs=0.01)
    assert (model[-1].weight != 0).any()


def test_parameters_of_three_dimensions_in_half_precision() -> None:
    experts = nn.Module()
    experts.weight = nn.Parameter(torch.randn(3, 4, 5).bfloat16())
    experts.norm = nn.Parameter(torch.tensor([0.0, 1.0]))
    with torch.no_grad():
        experts.weight[:, ::2] = 0.0
    with keep_zeros(experts) as keeper:
        optimizer = torch.optim.SGD(experts.parameters(), lr=1.0)
        (experts.weight.sum() + experts.norm.sum()).backward()
        optimizer.step()
        assert set(keeper.kept) == {"weight"}
    assert (experts.weight[:, ::2] == 0).all() and (experts.norm != 0).any()


def test_a_dense_model_is_refused() -> None:
    with pytest.raises(RecipeError, match="no zeros"):
        keep_zeros(net())
    frozen = net().requires_grad_(False)
    prune_weights(frozen, sparsity=0.5)
    with pytest.raises(RecipeError, match="want gradients"):
        keep_zeros(frozen)


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(3, 300, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def test_trainer_keeps_zeros_into_its_checkpoints(tmp_path: Path) -> None:
    model: Any = tiny_llama(num_hidden_layers=2).train()
    prune_weights(model, pattern="2:4")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    settings = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=4,
        save_steps=4,
        learning_rate=0.01,
        weight_decay=0.1,
        max_grad_norm=1.0,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    with keep_zeros(model):
        Trainer(model=model, args=settings, train_dataset=Rows()).train()
    saved = type(model).from_pretrained(tmp_path / "checkpoint-4")
    for name, parameter in saved.named_parameters():
        assert not torch.equal(parameter, before[name]), name
        if "_proj" in name:
            assert torch.equal(parameter == 0, before[name] == 0), name
            assert ((parameter != 0).view(len(parameter), -1, 4).sum(-1) == 2).all()
