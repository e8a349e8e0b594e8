"""Taylor and Fisher scores against autograd of explicit masks in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conformance.cases import CASES as DECODERS
from conformance.cases_encoders import CASES as OTHERS
from tiny import VOCABULARY, tiny_llama
from torch import Tensor, nn
from torch.nn import functional as F

from hf_shrink.architectures import bind
from hf_shrink.architectures.bound import BoundAttention, BoundMlp
from hf_shrink.calibration.labels import log_loss
from hf_shrink.calibration.targets import kind_of
from hf_shrink.errors import CalibrationError, RecipeError
from hf_shrink.progress import quiet
from hf_shrink.pruning.base import WIDTH
from hf_shrink.pruning.plan_width import plan_width
from hf_shrink.pruning.sensitivities import mask_gradients
from hf_shrink.pruning.units import channel_view, group_view, head_view
from hf_shrink.recipe import PruneStep


def tokens(rows: int = 3, length: int = 20) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, VOCABULARY, (rows, length))}


def masked_gradients(model: nn.Module, path: str, batch: dict[str, Tensor], loss: Any) -> Tensor:
    """float64 (samples, in): autograd of a mask on the input of the matrix at `path`, a sample at a time."""
    model = copy.deepcopy(model).double()
    module = model.get_submodule(path)
    rows = []
    for row in range(len(batch["input_ids"])):
        one = {key: value[row : row + 1] for key, value in batch.items()}
        mask = torch.ones(module.weight.shape[1], dtype=torch.double, requires_grad=True)
        handle = module.register_forward_pre_hook(lambda _, args, mask=mask: (args[0] * mask,))
        rows.append(torch.autograd.grad(loss(model, one), mask)[0])
        handle.remove()
    return torch.stack(rows)


def next_token(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    ids, logits = batch["input_ids"], model(**batch, use_cache=False).logits
    real = batch.get("attention_mask", torch.ones_like(ids)).bool()
    mask = real[:, 1:] & real[:, :-1]
    return F.cross_entropy(logits[:, :-1][mask], ids[:, 1:][mask], reduction="sum")


def found_gradients(model: nn.Module, part: BoundAttention | BoundMlp, batches: Any, **options: Any) -> Tensor:
    path = part.slot("down" if isinstance(part, BoundMlp) else "output").path
    settings: dict[str, Any] = {"tokens": None, "labels": "auto", "seed": 0, "progress": quiet, **options}
    blocks = [block.module for block in bind(model).blocks]
    return mask_gradients(model, blocks, {path: part.modules[path]}, batches, **settings)[path]


@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_scores_are_the_gradients_of_masks(kind: str) -> None:
    """Every sample's gradient, of channels, query heads and KV groups, with padding; and the scores made of them."""
    model, batch = tiny_llama(), tokens()
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][1, :6] = 0
    part = getattr(bind(model).blocks[1], kind)
    found = found_gradients(model, part, [batch])
    expected = masked_gradients(model, part.slot("down" if kind == "mlp" else "output").path, batch, next_token)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    if kind == "mlp":
        views = [(channel_view(part, None, found), expected)]
    else:
        views = [
            (head_view(part, None, found), expected.view(3, 6, 16).sum(-1)),
            (group_view(part, None, found), expected.view(3, 3, 32).sum(-1)),
        ]
    for view, units in views:
        taylor, fisher = (WIDTH.build(name, {}).score(view).double() for name in ("taylor", "fisher"))
        torch.testing.assert_close(taylor, units.abs().mean(0), rtol=1e-3, atol=1e-4 * float(units.abs().max()))
        torch.testing.assert_close(fisher, units.square().mean(0), rtol=1e-3, atol=1e-3 * float(units.square().max()))


def test_the_gradient_of_a_mask_is_that_of_the_weights_that_read_the_unit() -> None:
    """LLM-Pruner's group form, w * dL/dw summed over the columns of down, without a gradient of any weight."""
    model, batch = tiny_llama(), tokens(rows=1)
    mlp = bind(model).blocks[2].mlp
    assert mlp
    found = found_gradients(model, mlp, [batch])[0]
    weight = model.model.layers[2].mlp.down_proj.weight
    (gradient,) = torch.autograd.grad(next_token(model, batch), weight)
    torch.testing.assert_close(found, (weight * gradient).sum(0), rtol=1e-3, atol=1e-4 * float(found.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [0, -1])
def test_half_precision_models_are_read_in_float32_and_left_as_they_were(dtype: torch.dtype, block: int) -> None:
    """Of the first block too, to which gradients come through all others."""
    model, batch = tiny_llama().to(dtype), tokens()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    mlp = bind(model).blocks[block].mlp
    assert mlp
    found = found_gradients(model, mlp, [batch])
    expected = masked_gradients(model, mlp.slot("down").path, batch, next_token)
    torch.testing.assert_close(found.double(), expected, rtol=0.1, atol=0.02 * float(expected.abs().max()))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None and p.dtype == dtype for p in model.parameters())
    assert "forward" not in vars(model.model.layers[0])


def test_labels_drawn_from_the_model_give_its_fisher_information() -> None:
    """Means over many draws against the sum over all classes: E[(dL/dm)²] for one position that is predicted."""
    model, batch = tiny_llama(vocab_size=7, pad_token_id=None, bos_token_id=None, eos_token_id=None), tokens(1, 2)
    batch = {"input_ids": batch["input_ids"] % 7}
    mlp = bind(model).blocks[3].mlp
    assert mlp
    many = {"input_ids": batch["input_ids"].repeat(2000, 1)}
    found = found_gradients(model, mlp, [many], labels="model").double().square().mean(0)

    def of_class(label: int) -> Any:
        return lambda model, one: -model(**one, use_cache=False).logits[0, 0].log_softmax(-1)[label]

    with torch.no_grad():
        chance = model(**batch).logits[0, 0].double().softmax(-1)
    path = mlp.slot("down").path
    expected = sum(chance[k] * masked_gradients(model, path, batch, of_class(k))[0].square() for k in range(7))
    torch.testing.assert_close(found, expected, rtol=0.15, atol=0.02 * float(expected.max()))


@pytest.mark.parametrize(
    "name", ["decoder_gpt2", "decoder_opt", "bert_masked_lm", "t5", "vit", "clip", "xlm_roberta_tagger"]
)
def test_every_kind_of_model_has_a_loss(name: str) -> None:
    """Written, masked, classified, encoded: with no labels in the data."""
    cases = {**{f"decoder_{key}": case for key, case in DECODERS.items()}, **OTHERS}
    model, inputs = cases[name].build(), cases[name].inputs()
    step = PruneStep("width", "fisher", ratio=0.2, units="mlp")
    plan = plan_width(model, bind(model), step, WIDTH.build("fisher", {}), [inputs])
    again = plan_width(model, bind(model), step, WIDTH.build("fisher", {}), [inputs])
    assert plan.blocks == again.blocks, "the same seed gives the same plan"
    assert any(block.channels is not None for block in plan.blocks.values())


def test_dead_channels_go_first() -> None:
    model = tiny_llama()
    dead = [3, 10, 41, 79]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[dead] = 0
    for method in ("taylor", "fisher"):
        step = PruneStep("width", method, ratio=0.03, units="mlp")
        plan = plan_width(model, bind(model), step, WIDTH.build(method, {}), [tokens()])
        for block in plan.blocks.values():
            assert block.channels is not None and not set(dead) & set(block.channels)


def test_states_without_a_distribution_have_a_loss_too() -> None:
    class Output(dict[str, Any]):
        pass

    states = torch.randn(2, 5, 8, dtype=torch.double, requires_grad=True)
    loss = log_loss("other", {}, Output(last_hidden_state=states), "auto", torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(loss, states)
    assert float((gradient * states).sum(-1).detach().abs().max()) < 1e-4, "only directions count, not lengths"
    assert kind_of(nn.Linear(1, 1)) == "other"


def test_scores_have_a_loss_too() -> None:
    """Of one class the likelihood is 1 and every gradient 0."""
    scores = torch.randn(3, 1, requires_grad=True)
    outputs: dict[str, Any] = {"logits": scores}
    loss = log_loss("other", {}, outputs, "auto", torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(loss, scores)
    assert float(gradient.abs().min()) > 0
    with pytest.raises(CalibrationError, match="auto"):
        log_loss("other", {}, outputs, "data", torch.Generator())


def test_labels_of_the_data_count_whatever_the_head() -> None:
    """They were left aside for heads of classes: `labels: data` gave a loss of 0, and so scores of 0."""
    some = torch.Generator().manual_seed(0)

    def loss(kind: Any, batch: dict[str, Tensor], outputs: Any, labels: Any = "data") -> float:
        return float(log_loss(kind, batch, outputs, labels, some))

    logits = torch.randn(4, 5)
    classes = torch.tensor([0, 4, 2, 2])
    expected = float(F.cross_entropy(logits.double(), classes, reduction="sum"))
    for labels in ("data", "auto"):
        assert loss("other", {"labels": classes}, {"logits": logits}, labels) == pytest.approx(expected, rel=1e-5)

    wanted = torch.randint(2, (4, 5)).float()
    expected = float(F.binary_cross_entropy_with_logits(logits.double(), wanted.double(), reduction="sum"))
    assert loss("several", {"labels": wanted}, {"logits": logits}) == pytest.approx(expected, rel=1e-5)

    tags = torch.tensor([[1, -100, 3], [-100, 0, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    words = torch.randn(2, 3, 5)
    expected = -float(words[[0, 0, 1], [0, 2, 1]].double().log_softmax(-1)[range(3), [1, 3, 0]].sum())
    found = loss("other", {"labels": tags, "attention_mask": mask}, {"logits": words})
    assert found == pytest.approx(expected, rel=1e-5)

    spans = {"start_logits": torch.randn(2, 7), "end_logits": torch.randn(2, 7)}
    batch = {"start_positions": torch.tensor([1, 6]), "end_positions": torch.tensor([3, 9])}  # 9 is cut off
    both = [spans[name].double().log_softmax(-1) for name in spans]
    expected = -float(both[0][0, 1] + both[0][1, 6] + both[1][0, 3])
    assert loss("other", batch, spans) == pytest.approx(expected, rel=1e-5)

    with pytest.raises(CalibrationError, match=r"no labels.*auto"):
        loss("other", {"input_ids": classes}, {"logits": logits})
    with pytest.raises(CalibrationError, match="5 classes"):
        loss("other", {"labels": classes + 1}, {"logits": logits})


def test_what_cannot_be_scored_is_said() -> None:
    model = tiny_llama()
    step = PruneStep("width", "taylor", ratio=0.2, units="mlp")
    with pytest.raises(CalibrationError, match="need calibration data"):
        plan_width(model, bind(model), step, WIDTH.build("taylor", {}), [])
    with pytest.raises(RecipeError, match="labels"):
        WIDTH.build("taylor", {"labels": "text"})
    with pytest.raises(RecipeError, match="at least 1"):
        WIDTH.build("fisher", {"tokens": 0})
    mlp = bind(model).blocks[0].mlp
    assert mlp
    with pytest.raises(CalibrationError, match="gradients"):
        WIDTH.build("fisher", {}).score(channel_view(mlp, None))
