"""Tuning on whole tiny models: nearer to the dense model on held-out batches, or as it was."""

from __future__ import annotations

import copy
import itertools
import re
from typing import Any

import pytest
import torch
from conformance.cases_encoders import CASES as ENCODERS
from tiny import tiny_llama
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
)

from hf_shrink import shrink
from hf_shrink.architectures import bind
from hf_shrink.calibration.rerunning import rerunning_blocks
from hf_shrink.errors import CalibrationError, RecipeError
from hf_shrink.tuning import Teacher, Tuning, distill, tune

SCHEME = {"scheme": "W2A16", "group_size": 16, "symmetric": False}


def batches(count: int = 8, rows: int = 4, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    found = []
    for index in range(count):
        mask = torch.ones(rows, 14, dtype=torch.long)
        mask[0, : index % 5] = 0
        found.append({"input_ids": torch.randint(3, 200, (rows, 14), generator=draw), "attention_mask": mask})
    return found


def small_llama(seed: int = 0) -> PreTrainedModel:
    return tiny_llama(seed, num_hidden_layers=2)


def shrunk(
    model: Any,
    options: dict[str, Any] | None,
    data: list[dict[str, torch.Tensor]] | None = None,
    method: str = "rtn",
) -> Any:
    step = {"method": method, **SCHEME, **({"tune": options} if options else {})}
    recipe = {"portable": False, "steps": [{"quantize": step}]}
    return shrink(model, recipe, calibration=data or batches(), progress=False)


def divergence(model: PreTrainedModel, dense: PreTrainedModel, data: list[dict[str, torch.Tensor]]) -> float:
    """KL(dense || model) in nats a real token, float64, written out."""
    total = count = 0.0
    with torch.no_grad():
        for batch in data:
            p, q = (m(**batch).logits.double().log_softmax(-1)[batch["attention_mask"].bool()] for m in (dense, model))
            total += float((p.exp() * (p - q)).sum())
            count += len(p)
    return total / count


@pytest.fixture(scope="module")
def plain() -> Any:
    """Quantized by GPTQ and not tuned; read only."""
    return shrunk(small_llama(), None, method="gptq")


@pytest.mark.parametrize("rounding", [False, True])
def test_it_comes_nearer_to_the_dense_model_on_fresh_data(rounding: bool, plain: Any) -> None:
    dense, fresh = small_llama(), batches(seed=1)
    options = {"steps": 60, "learning_rate": 0.01, "rounding": rounding, "rounding_rate": 0.02}
    tuned = shrunk(small_llama(), options, method="gptq")
    assert divergence(tuned, dense, fresh) < 0.95 * divergence(plain, dense, fresh)
    assert any("tuning took the KL divergence" in note for note in tuned.shrink_report.notes)
    assert tuned.shrink_report.seconds["tune"] > 0
    moved = [
        name
        for (name, a), (_, b) in zip(plain.state_dict().items(), tuned.state_dict().items(), strict=True)
        if not torch.equal(a, b)
    ]
    kinds = {name.rpartition(".")[2] for name in moved}
    assert ("weight_packed" in kinds) == rounding
    assert "weight_scale" in kinds and any("norm" in name for name in moved)
    assert not any("embed" in name or "lm_head" in name for name in moved)


def test_roundings_turn_at_the_default_rate(plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether so small a model gains by it depends on the processor's rounding, so that it is kept in any case."""
    losses = itertools.count(100, -1)
    monkeypatch.setattr(distill, "_mean_loss", lambda *args: float(next(losses)))
    tuned = shrunk(small_llama(), {"steps": 60, "rounding": True, "learning_rate": 0.01}, method="gptq")
    packed = [name for name in plain.state_dict() if name.endswith("weight_packed")]
    assert any(not torch.equal(plain.state_dict()[name], tuned.state_dict()[name]) for name in packed)
    for steps in (60, 1000):  # the whole way, of which a cosine leaves half, is more than half a step of the grid
        assert 0.5 < 0.5 * steps * Tuning(steps=steps).integer_rate < 1


def test_rates_fit_the_grid_unless_they_are_given() -> None:
    assert Tuning(steps=1).scale_rate(2) == 2 * Tuning(steps=1).scale_rate(3) == 0.004
    assert Tuning(steps=2).integer_rate < 0.05
    given = Tuning(steps=1, learning_rate=0.1, rounding_rate=0.2)
    assert (given.scale_rate(2), given.integer_rate) == (0.1, 0.2)


def test_rounding_is_left_alone_where_it_would_take_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"steps": 6, "learning_rate": 0.01, "rounding_rate": 0.02}
    small = shrunk(small_llama(), {**options, "rounding": "auto"})
    monkeypatch.setattr("hf_shrink.tuning.distill.MOST_ROUNDED", 1000)
    large = shrunk(small_llama(), {**options, "rounding": "auto"})
    for found, rounding in ((small, True), (large, False)):
        expected = shrunk(small_llama(), {**options, "rounding": rounding})
        for name, tensor in expected.state_dict().items():
            assert torch.equal(tensor, found.state_dict()[name]), name
        assert any("tune.rounding: true" in note for note in found.shrink_report.notes) != rounding


def test_the_loss_is_the_divergence() -> None:
    dense, data = tiny_llama(), batches(2)
    teacher = Teacher(dense, data, lambda *_: None)
    other = tiny_llama()
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "mlp" in name:
                parameter *= 0.9
        found = [float(teacher.loss(other, index)) for index in range(2)]
    expected = [divergence(other, dense, [batch]) for batch in data]
    assert found == pytest.approx(expected, rel=0.03)  # products in bfloat16 where the processor has them
    assert float(teacher.loss(dense, 0).detach()) < 1e-3
    assert teacher.unit == "KL divergence"


def test_what_gets_worse_is_taken_back(plain: Any) -> None:
    options = {"steps": 3, "learning_rate": 0.9, "rounding": True, "rounding_rate": 0.9}
    ruined = shrunk(small_llama(), options, method="gptq")
    assert any("was taken back" in note for note in ruined.shrink_report.notes)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, ruined.state_dict()[name]), name
    assert [p.requires_grad for p in ruined.parameters()] == [p.requires_grad for p in plain.parameters()]


def test_an_interrupt_while_it_is_judged_leaves_the_model_as_it_was(
    plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judged(*arguments: Any) -> float:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return 1.0

    calls: list[Any] = []
    monkeypatch.setattr(distill, "_mean_loss", judged)
    model, before = copy.deepcopy(plain), plain.state_dict()
    teacher = Teacher(small_llama(), batches(4), lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        tune(model, teacher, Tuning(steps=2, learning_rate=0.1, rounding=True), 0, lambda *_: None)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())


def test_same_seed_same_bytes() -> None:
    first, second = (shrunk(small_llama(), {"steps": 6, "rounding": True}) for _ in range(2))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_a_half_precision_model_keeps_its_dtypes() -> None:
    model = shrunk(small_llama().to(torch.bfloat16), {"steps": 10, "learning_rate": 0.01})
    assert any("tuning" in note for note in model.shrink_report.notes)
    assert {t.dtype for t in model.state_dict().values() if t.is_floating_point()} == {torch.bfloat16}
    assert all(p.requires_grad for p in model.parameters())


HALF = {"vocab_size": 200, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES = {**HALF, "intermediate_size": 80, "initializer_range": 0.2}
WITH_BIASES = {
    "opt": lambda: OPTForCausalLM(OPTConfig(**HALF, ffn_dim=80, init_std=0.2, word_embed_proj_dim=48)),
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZES)),
    "phi": lambda: PhiForCausalLM(PhiConfig(**SIZES)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
}


def with_biases(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    dense = WITH_BIASES[name]().eval()
    with torch.no_grad():
        for path, parameter in dense.named_parameters():
            if path.endswith("bias"):
                parameter.normal_(std=0.1)
    return dense


def share_left(model: PreTrainedModel) -> float:
    """Of the loss on held-out batches, after a few steps of tuning."""
    model = shrunk(model, {"steps": 16, "learning_rate": 0.02}, batches(4))
    (note,) = [note for note in model.shrink_report.notes if note.startswith("tuning took")]
    before, after = (float(number) for number in re.findall(r"\d\.\S+", note))
    return after / before


@pytest.mark.parametrize(("name", "native"), [*((name, False) for name in WITH_BIASES), ("opt", True)])
def test_half_precision_is_as_good_as_float32(name: str, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where bfloat16 products are not native, so that nothing casts by itself."""
    for module in ("ops.precision", "runtime.attention", "runtime.kernels.base"):
        monkeypatch.setattr(f"hf_shrink.{module}.multiplies_bfloat16", lambda device: native)
    expected = share_left(with_biases(name))
    assert expected < 0.95
    for dtype in (torch.bfloat16, torch.float16):
        model = with_biases(name).to(dtype)
        assert share_left(model) == pytest.approx(expected, rel=0.05)
        assert {t.dtype for t in model.state_dict().values() if t.is_floating_point()} == {dtype}


def test_small_gradients_are_not_lost_in_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Teacher.loss
    monkeypatch.setattr(Teacher, "loss", lambda *arguments: real(*arguments) / 2**14)
    assert share_left(with_biases("opt").half()) == pytest.approx(share_left(with_biases("opt")), rel=0.05)


def bert(kind: type[PreTrainedModel]) -> PreTrainedModel:
    torch.manual_seed(0)
    settings = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4}
    return kind(BertConfig(vocab_size=200, num_labels=3, **settings)).eval()


@pytest.mark.parametrize("kind", [BertModel, BertForSequenceClassification])
def test_models_without_an_output_head(kind: type[PreTrainedModel]) -> None:
    model = shrunk(bert(kind), {"steps": 20, "learning_rate": 0.01})
    (note,) = [note for note in model.shrink_report.notes if "tuning" in note]
    assert ("KL divergence" if kind is BertForSequenceClassification else "relative squared error") in note


def test_an_encoder_decoder_that_adds_to_its_logits() -> None:
    dense = ENCODERS["bart"].build()
    dense.final_logits_bias.normal_(std=2.0)
    draw = torch.Generator().manual_seed(0)
    data = []
    for index in range(10):
        labels = torch.randint(5, 300, (4, 9), generator=draw)
        labels[0, 4 + index % 4 :] = -100
        data.append({"input_ids": torch.randint(5, 300, (4, 12), generator=draw), "labels": labels})
    plain, tuned = (
        shrunk(copy.deepcopy(dense), options, data[:8]) for options in (None, {"steps": 24, "learning_rate": 0.02})
    )
    assert any("tuning took the KL divergence" in note for note in tuned.shrink_report.notes)
    losses = [0.0, 0.0]
    with torch.no_grad():
        for batch in data[8:]:
            real = batch["labels"] != -100
            rows = [m(**batch).logits[real].double().log_softmax(-1) for m in (dense, plain, tuned)]
            for place, own in enumerate(rows[1:]):
                losses[place] += float((rows[0].exp() * (rows[0] - own)).sum())
    assert losses[1] < 0.95 * losses[0]


def test_blocks_that_run_again_give_the_same_gradients() -> None:
    model, data = tiny_llama(), batches(1)
    teacher = Teacher(tiny_llama(seed=1), data, lambda *_: None)
    teacher.loss(model, 0).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    runs = []
    hook = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    with rerunning_blocks([block.module for block in bind(model).blocks]):
        teacher.loss(model, 0).backward()
    hook.remove()
    assert len(runs) == 2
    assert len(expected) > 30
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-6)
    assert not any("forward" in vars(layer) for layer in model.model.layers)


def test_a_batch_is_left_to_train_on() -> None:
    model = shrunk(small_llama(), {"steps": 2, "held_out": 0.9}, batches(2))
    assert any("tuning" in note for note in model.shrink_report.notes)


def test_one_batch_is_not_enough() -> None:
    with pytest.raises(CalibrationError, match=r"at least 2 batches.*calibration.samples"):
        shrunk(small_llama(), {"steps": 2}, batches(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": 3}, "did you mean 'steps'"),
        ({"learning_rate": 0.1}, "needs steps"),
        ({"steps": 0}, "whole number"),
        ({"steps": 3, "tokens": 0.5}, "tune.tokens must be a whole number"),
        ({"steps": 3, "rounding": "yes"}, "true, false or auto"),
        ({"steps": 3, "held_out": 1.0}, "above 0 and below 1"),
    ],
)
def test_options_are_checked_when_the_recipe_is_read(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        shrunk(small_llama(), options)


def test_a_loss_that_is_not_finite_leaves_the_model_as_it_was() -> None:
    model, data = shrunk(small_llama(), None), batches(4)
    teacher = Teacher(small_llama(), data, lambda *_: None)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CalibrationError, match=r"not finite.*learning_rate"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher, "loss", lambda m, i: sum(p.sum() for p in m.parameters() if p.requires_grad) * torch.nan)
        tune(model, teacher, Tuning(steps=2), 0, lambda *_: None)
    for name, tensor in before.items():
        assert torch.equal(tensor, model.state_dict()[name])
