"""recover: nearer to the dense model on fresh data, or as it was bit for bit."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tiny import TEXT, tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification

from hf_shrink import (
    ArchitectureError,
    CalibrationError,
    CheckpointError,
    Plan,
    RecipeError,
    kernel_summary,
    load_adapter,
    recover,
    shrink,
)
from hf_shrink.calibration.data import calibration_batches
from hf_shrink.plan import BlockPlan, StackPlan
from hf_shrink.training.recovery import session
from hf_shrink.training.recovery.session import Session

HEADS = {"head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
FEW = {"steps": 30, "tokens": 64, "learning_rate": 0.005}
LORA = {**FEW, "rank": 4}


def dense_model(**changes: Any) -> Any:
    """Widths that bitsandbytes' 4-bit kernels take; blocks that can be missed."""
    return tiny_llama(3, **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, **HEADS, **changes})


def batches(count: int = 36, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    found = []
    for index in range(count):
        mask = torch.ones(4, 16, dtype=torch.long)
        mask[0, : index % 5] = 0
        found.append({"input_ids": torch.randint(3, 20, (4, 16), generator=draw), "attention_mask": mask})
    return found


def divergence(model: Any, dense: Any) -> float:
    """KL(dense || model) in nats a real token of fresh data."""
    total = count = 0.0
    with torch.no_grad():
        for batch in batches(4, seed=9):
            p, q = (m(**batch).logits.double().log_softmax(-1)[batch["attention_mask"].bool()] for m in (dense, model))
            total += float((p.exp() * (p - q)).sum())
            count += len(p)
    return total / count


def state(model: Any) -> dict[str, Any]:
    """All that may be told apart of a model from outside."""
    return {
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "wanted": [(name, p.requires_grad) for name, p in model.named_parameters()],
        "types": [(name, type(m), m.training) for name, m in model.named_modules()],
        "attributes": set(vars(model)),
        "config": model.config.to_dict(),
        "random": (random.getstate()[1][:5], torch.get_rng_state().tolist()),
    }


def assert_same(found: dict[str, Any], wanted: dict[str, Any], *, weights: bool = True) -> None:
    for key in wanted.keys() - {"weights"}:
        assert found[key] == wanted[key], key
    assert found["weights"].keys() == wanted["weights"].keys()
    for name, tensor in wanted["weights"].items():
        assert found["weights"][name].dtype == tensor.dtype
        if weights:
            assert torch.equal(found["weights"][name], tensor), name


@pytest.fixture(scope="module")
def dense() -> Any:
    return dense_model()


@pytest.fixture(scope="module")
def pruned(dense: Any) -> Any:
    """Without channels: read only."""
    blocks = {index: BlockPlan(channels=tuple(range(96))) for index in range(3)}
    plan = Plan("llama", stacks={"decoder": StackPlan((0, 1, 2), blocks)}, refit=False)
    return shrink(copy.deepcopy(dense), plan, progress=False)


@pytest.fixture(scope="module")
def packed(dense: Any) -> Any:
    recipe = {"steps": [{"quantize": {"method": "rtn", "scheme": "W2A16", "group_size": 32}}]}
    return shrink(copy.deepcopy(dense), recipe, progress=False)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_pruned_model_comes_nearer_and_stays_an_ordinary_one(method: str, dense: Any, pruned: Any, tmp_path) -> None:
    model = copy.deepcopy(pruned)
    before, far = state(model), divergence(model, dense)
    options = {**(LORA if method == "lora" else {**FEW, "learning_rate": 0.002}), "hidden": 0.1}
    found = recover(model, teacher=dense, data=batches(), method=method, progress=False, **options)
    assert found.model is model and found.adopted and found.after < found.before and found.steps == 30
    assert divergence(model, dense) < 0.9 * far
    assert_same(state(model), before, weights=False)
    assert "held-out data from" in found.note
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


@pytest.mark.parametrize("method", ["lora", "full", "scales"])
def test_what_did_not_help_is_taken_back_bit_for_bit(method: str, pruned: Any, packed: Any) -> None:
    model = copy.deepcopy(packed if method == "scales" else pruned)
    before = state(model)
    options = {**FEW, "steps": 3}
    found = recover(model, teacher=copy.deepcopy(model), data=batches(), method=method, progress=False, **options)
    assert not found.adopted and found.model is model and "taken back" in found.note
    assert_same(state(model), before)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_failure_on_the_way_leaves_the_model_as_it_was(method, dense, pruned, monkeypatch) -> None:
    model = copy.deepcopy(pruned)
    before = state(model)
    loss = Session.loss
    calls: list[int] = []

    def fails_later(session: Any, model: Any) -> float:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return loss(session, model)

    monkeypatch.setattr(Session, "loss", fails_later)
    with pytest.raises(KeyboardInterrupt):
        recover(model, teacher=dense, data=batches(), method=method, progress=False, **{**FEW, "steps": 2})
    assert_same(state(model), before)


@pytest.mark.parametrize("kind", ["packed", "NF4"])
def test_an_adapter_beside_quantized_weights(kind: str, dense: Any, packed: Any, tmp_path) -> None:
    if kind == "packed":
        model = copy.deepcopy(packed)
    else:
        recipe = {"steps": [{"quantize": {"method": "bitsandbytes", "scheme": "NF4"}}]}
        model = shrink(copy.deepcopy(dense), recipe, progress=False)
    weights, far = state(model)["weights"], divergence(model, dense)
    tolerance = 1e-3 if kind == "packed" else 0.02  # bitsandbytes rounds scales anew on a CPU with AVX512-BF16
    found = recover(model, teacher=dense, data=batches(), method="lora", progress=False, **LORA)
    assert found.adopted and isinstance(found.model, PeftModel)
    near = divergence(found.model, dense)
    assert near < 0.9 * far
    model.save_pretrained(tmp_path / "small")  # as README says: PEFT has put the adapters into it
    found.model.save_pretrained(tmp_path / "small" / "adapter")
    assert divergence(found.model, dense) == near
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    for name, tensor in weights.items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert again.state_dict().keys() == weights.keys()
    assert divergence(again, dense) == pytest.approx(far, rel=tolerance)
    assert divergence(load_adapter(again, tmp_path / "small" / "adapter"), dense) == pytest.approx(near, rel=tolerance)
    with pytest.raises(CheckpointError, match="no adapter"):
        load_adapter(again, tmp_path)


def test_scales_are_what_packed_weights_recover_by_default(dense: Any, packed: Any) -> None:
    model = copy.deepcopy(packed)
    far, kernels = divergence(model, dense), {k: len(v) for k, v in kernel_summary(model).items()}
    found = recover(model, teacher=dense, data=batches(), progress=False, **{**FEW, "steps": 40})
    assert (
        found.adopted and found.model is model and found.unit == "KL divergence" and "(scales, 40 steps" in found.note
    )
    assert divergence(model, dense) < 0.9 * far
    assert {k: len(v) for k, v in kernel_summary(model).items()} == kernels


def test_pruned_weights_stay_zero(dense: Any) -> None:
    recipe = {"steps": [{"prune": {"what": "weights", "method": "magnitude", "sparsity": 0.5}}]}
    model = shrink(copy.deepcopy(dense), recipe, progress=False)
    zeros = {name: p == 0 for name, p in model.named_parameters() if p.dim() == 2 and (p == 0).float().mean() > 0.4}
    assert len(zeros) == 21
    with pytest.raises(ArchitectureError, match="'full'"):
        recover(model, teacher=dense, data=batches(), method="lora", progress=False, **LORA)
    far = divergence(model, dense)
    options = {**FEW, "learning_rate": 0.002}
    assert recover(model, teacher=dense, data=batches(), method="full", progress=False, **options).adopted
    assert divergence(model, dense) < 0.9 * far
    for name, parameter in model.named_parameters():
        if name in zeros:
            assert torch.equal(parameter == 0, zeros[name])


def test_half_precision_and_no_teacher(dense: Any) -> None:
    """The text's own next tokens, in bfloat16 weights that stay so; text read with the tokenizer."""
    model = dense_model().to(torch.bfloat16)
    found = recover(
        model,
        data=Dataset.from_dict({"text": [TEXT]})["text"],
        tokenizer=tiny_tokenizer(),
        method="full",
        progress=False,
        samples=12,
        length=16,
        **{**FEW, "learning_rate": 0.002},
    )
    assert found.adopted and found.unit == "loss on the data's own labels" and found.after < 0.9 * found.before
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_both_losses_are_of_the_model_as_it_is_stored(dtype: torch.dtype, dense: Any, pruned: Any) -> None:
    model = copy.deepcopy(pruned).to(dtype)
    before = state(model)
    options = {**FEW, "steps": 1, "learning_rate": 1e-12}  # too little for any weight of the dtype
    found = recover(model, teacher=dense, data=batches(8), method="full", progress=False, **options)
    assert found.before == found.after and not found.adopted
    assert_same(state(model), before)


def test_a_classifier_learns_from_its_teacher() -> None:
    torch.manual_seed(1)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
    config = BertConfig(vocab_size=60, num_labels=3, initializer_range=0.3, **sizes)
    teacher, model = BertForSequenceClassification(config).eval(), BertForSequenceClassification(config).eval()
    data = [{"input_ids": torch.randint(5, 60, (4, 9))} for _ in range(8)]
    found = recover(model, teacher=teacher, data=data, progress=False, **{**LORA, "tokens": 36})
    assert found.adopted and found.after < 0.7 * found.before


def test_hidden_states_where_a_copy_is_trained(dense: Any, pruned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under FSDP, in one process."""
    monkeypatch.setattr(session, "spreads", lambda: True)
    model = copy.deepcopy(pruned)
    found = recover(
        model, teacher=dense, data=batches(8), method="full", hidden=0.1, progress=False, **{**FEW, "steps": 2}
    )
    assert found.steps == 2 and found.unit == "loss"


@pytest.mark.parametrize("method", ["full", "scales"])
def test_a_teacher_writes_without_dropout_and_is_left_as_it_was(method: str, pruned: Any, packed: Any, monkeypatch):
    seen: list[bool] = []

    def watched(*arguments: Any, model: Any, **more: Any) -> Any:
        seen.append(any(module.training for module in model.modules()))
        return calibration_batches(*arguments, model=model, **more)

    monkeypatch.setitem(recover.__globals__, "calibration_batches", watched)  # its module has its name
    teacher = dense_model().train()
    teacher.model.layers[0].eval()
    modes = [module.training for module in teacher.modules()]
    model = copy.deepcopy(packed if method == "scales" else pruned)
    recover(model, teacher=teacher, data=batches(8), method=method, progress=False, **{**FEW, "steps": 1})
    assert seen == [False] and [module.training for module in teacher.modules()] == modes
    with torch.device("meta"):
        elsewhere = tiny_llama(num_hidden_layers=1)
    with session.in_eval_mode(elsewhere):
        elsewhere.to_empty(device="cpu")
    assert elsewhere.device == torch.device("meta")


def test_a_batch_is_left_to_train_on(dense: Any, pruned: Any) -> None:
    options = {**FEW, "steps": 2, "held_out": 0.99}
    found = recover(copy.deepcopy(pruned), teacher=dense, data=batches(2), method="full", progress=False, **options)
    assert found.steps == 2


def test_the_same_seed_gives_the_same_model(dense: Any, pruned: Any) -> None:
    models = [copy.deepcopy(pruned) for _ in range(2)]
    for model in models:
        torch.rand(3)  # the state of the generators does not matter
        found = recover(model, teacher=dense, data=batches(), progress=False, **{**LORA, "steps": 4})
        assert found.adopted
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_minutes_end_it(dense: Any, pruned: Any) -> None:
    found = recover(
        copy.deepcopy(pruned), teacher=dense, data=batches(), minutes=0.02, progress=False, tokens=64, rank=2
    )
    assert 1 <= found.steps < 300 and found.seconds < 10


def test_what_does_not_work_is_said_before_there_is_data(dense: Any, pruned: Any, packed: Any) -> None:
    def asked(model: Any = pruned, teacher: Any = dense, data: Any = "no such file.txt", **options: Any) -> None:
        recover(model, teacher=teacher, data=data, progress=False, **options)

    for words, options in {
        "needs an end": {},
        "did you mean 'steps'": {"step": 3},
        "unknown recovery method": {"steps": 3, "method": "loar"},
        "recovery.rank": {"steps": 3, "rank": 0},
        "the model itself": {"steps": 3, "teacher": pruned},
        "needs the dense model|pass teacher": {"steps": 3, "model": packed, "teacher": None},
        "predictions only": {"steps": 3, "model": packed, "hidden": 1.0},
        "by method 'scales' only": {"steps": 3, "rounding": True},
        "rank is of the adapters": {"steps": 3, "rank": 8, "method": "full"},
        "and this is 'scales'": {"steps": 3, "rank": 8, "model": packed},
        "hidden states are the teacher's": {"steps": 3, "teacher": None, "hidden": 1.0},
    }.items():
        with pytest.raises(RecipeError, match=words):
            asked(**options)
    with pytest.raises(ArchitectureError, match="no weight is packed"):
        asked(steps=3, method="scales")
    with pytest.raises(CalibrationError, match="at least 2 batches"):
        asked(steps=3, data=[{"input_ids": batches(1)[0]["input_ids"][:1]}])
    unlabelled = [{**batch, "labels": torch.full_like(batch["input_ids"], -100)} for batch in batches(4)]
    with pytest.raises(CalibrationError, match="no prediction of the batch counts"):
        asked(copy.deepcopy(pruned), steps=3, data=unlabelled)
    with pytest.raises(ArchitectureError, match="'scales', or 'lora'"):
        asked(packed, steps=3, method="full", data=batches())
    with pytest.raises(CalibrationError, match="no labels"):
        torch.manual_seed(0)
        classifier = BertForSequenceClassification(
            BertConfig(vocab_size=60, hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=40)
        )
        asked(classifier, None, [{"input_ids": torch.randint(5, 60, (4, 9))}] * 4, steps=3)
