"""DistillationTrainer: all heads, labels left out, and what goes on inside."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import tiny_llama
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

import hf_shrink
from hf_shrink import ArchitectureError, CalibrationError, DistillationTrainer, Plan, RecipeError
from hf_shrink.plan import StackPlan
from hf_shrink.training.distillation.states import pair_stacks

LOGITS = {"logits": 1.0, "task": 0.0, "temperature": 1.0}


def bert(cls, seed: int, **more):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
    config = BertConfig(vocab_size=60, max_position_embeddings=32, initializer_range=0.3, **sizes, **more)
    return cls(config).eval()


def texts(batch: int = 3, length: int = 8) -> dict[str, torch.Tensor]:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, -3:] = 0
    return {"input_ids": torch.randint(5, 60, (batch, length)), "attention_mask": mask}


def made(student, teacher, tmp_path, parts=LOGITS, **more):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], save_strategy="no")
    return DistillationTrainer(student, arguments, teacher=teacher, distillation=parts, **more)


def kl(own: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """Mean KL(dense || own) over rows of float64 logits."""
    log_own, log_dense = own.double().log_softmax(-1), dense.double().log_softmax(-1)
    return (log_dense.exp() * (log_dense - log_own)).sum(-1).mean()


def outputs_of(models, batch):
    with torch.no_grad():
        return [model(**{k: v for k, v in batch.items() if k != "labels"}) for model in models]


@pytest.mark.parametrize("head", ["masked", "sequence", "several", "numbers", "tokens", "answers", "images", "seq2seq"])
def test_every_head(head, tmp_path):
    torch.manual_seed(0)
    batch = texts()
    labels = torch.where(torch.rand(3, 8) < 0.4, batch["input_ids"], -100)
    real = batch["attention_mask"].bool()
    if head == "masked":
        pair, batch["labels"], counts = [bert(BertForMaskedLM, s) for s in (1, 2)], labels, labels != -100
    elif head == "tokens":
        pair = [bert(BertForTokenClassification, s, num_labels=5) for s in (1, 2)]
        batch["labels"] = labels % 5 * (labels > 0) - 100 * (labels < 0)
        counts = batch["labels"] != -100
    elif head == "answers":
        pair, counts = [bert(BertForQuestionAnswering, s) for s in (1, 2)], None
    elif head == "images":
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
        config = ViTConfig(image_size=8, patch_size=4, num_labels=4, initializer_range=0.3, **sizes)
        pair, batch, counts = [ViTForImageClassification(config).eval() for _ in range(2)], {}, None
        batch = {"pixel_values": torch.randn(3, 3, 8, 8), "labels": torch.tensor([0, 3, 1])}
    elif head == "seq2seq":
        sizes = {"d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 1, "num_heads": 3}
        config = T5Config(vocab_size=60, decoder_start_token_id=0, **sizes)
        pair = [T5ForConditionalGeneration(config).eval() for _ in range(2)]
        batch["labels"], counts = labels, labels != -100
    else:
        kinds = {"several": "multi_label_classification", "numbers": "regression"}
        more = {"num_labels": 1 if head == "numbers" else 4, "problem_type": kinds.get(head)}
        pair, counts = [bert(BertForSequenceClassification, s, **more) for s in (1, 2)], None
    trainer = made(*pair, tmp_path)
    found = trainer.compute_loss(pair[0], dict(batch))
    with torch.no_grad():
        own, dense = (model(**batch) if head == "seq2seq" else outputs_of([model], batch)[0] for model in pair)
    if head == "answers":
        wanted = (kl(own.start_logits, dense.start_logits) + kl(own.end_logits, dense.end_logits)) / 2
    elif head == "numbers":
        wanted = (own.logits - dense.logits).square().sum() / dense.logits.square().sum()
    elif head == "several":
        wanted = F.binary_cross_entropy_with_logits(own.logits, dense.logits.sigmoid())
        wanted = wanted - F.binary_cross_entropy_with_logits(dense.logits, dense.logits.sigmoid())
    else:
        rows = slice(None) if counts is None else counts & (real if head != "seq2seq" else True)
        wanted = kl(own.logits[rows], dense.logits[rows])
    assert wanted > 0.01
    torch.testing.assert_close(found.detach().double(), wanted.double(), rtol=1e-4, atol=1e-6)
    found.backward()
    assert all(p.grad is None for p in pair[1].parameters())
    assert sum(float(p.grad.norm()) for p in pair[0].parameters() if p.grad is not None) > 0


@pytest.mark.parametrize("said_by", ["labels", "teacher", "student"])
def test_several_classes_and_numbers_are_told_by_configs_or_labels(said_by, tmp_path):
    batch = {**texts(), "labels": torch.randint(2, (3, 4)).float()}
    if said_by == "labels":
        problems = (None, None)
    else:
        problems = ("regression", None) if said_by == "student" else (None, "multi_label_classification")
        del batch["labels"]
    pair = [
        bert(BertForSequenceClassification, s, num_labels=4, problem_type=p)
        for s, p in zip((1, 2), problems, strict=True)
    ]
    found = made(*pair, tmp_path).compute_loss(pair[0], dict(batch))
    own, dense = (output.logits for output in outputs_of(pair, batch))
    if said_by == "student":
        wanted = (own - dense).square().sum() / dense.square().sum()
    else:
        entropy = F.binary_cross_entropy_with_logits(dense, dense.sigmoid())
        wanted = F.binary_cross_entropy_with_logits(own, dense.sigmoid()) - entropy
    torch.testing.assert_close(found.detach(), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("problem", [None, "regression"])
def test_a_step_of_several_labels_or_numbers_counts_each_of_them(problem, tmp_path):
    batch = {**texts(), "labels": torch.randint(2, (3, 4)).float()}
    pair = [bert(BertForSequenceClassification, s, num_labels=4, problem_type=problem) for s in (1, 2)]
    trainer = made(*pair, tmp_path)
    trainer.model_accepts_loss_kwargs = True
    whole, of_step = (
        trainer.compute_loss(pair[0], dict(batch), num_items_in_batch=items) for items in (None, torch.tensor(24))
    )
    torch.testing.assert_close(of_step, whole / 2)  # half of the step's 24 labels


def test_next_tokens_temperature_and_the_task(tmp_path):
    student, teacher = tiny_llama(1, num_hidden_layers=2), tiny_llama(2, num_hidden_layers=2)
    ids, mask = torch.randint(3, 320, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    mask[1, :2] = 0  # on the left
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 3] = -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    trainer = made(student, teacher, tmp_path, {"logits": 0.5, "task": 2.0, "temperature": 3.0})
    found = trainer.compute_loss(student, dict(batch))
    scored = (labels[:, 1:] != -100) & mask[:, :-1].bool()
    own, dense = (o.logits[:, :-1][scored] / 3 for o in outputs_of([student, teacher], batch))
    with torch.no_grad():
        wanted = 0.5 * 9 * kl(own, dense) + 2.0 * student(**batch).loss.double()
    torch.testing.assert_close(found.detach().double(), wanted, rtol=1e-4, atol=1e-6)


def one_step(folder, size, accumulate):
    """Of plain gradient descent."""
    return TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulate,
        max_steps=1,
        optim="sgd",
        learning_rate=1.0,
        max_grad_norm=0.0,
        logging_steps=1,
    )


def test_every_token_counts_the_same_under_accumulation(tmp_path):
    data = [{"input_ids": torch.randint(3, 320, (6,))} for _ in range(4)]
    for number, example in enumerate(data):
        example["labels"] = example["input_ids"].clone()
        example["labels"][: number + 1] = -100
    teacher, found, logged = tiny_llama(2, num_hidden_layers=1), [], []
    for size in (4, 1):
        student = tiny_llama(1, num_hidden_layers=1)
        arguments = one_step(tmp_path, size, 4 // size)
        parts = {"logits": 1.0, "hidden": 0.0, "task": 0.5}
        trainer = DistillationTrainer(student, arguments, train_dataset=data, teacher=teacher, distillation=parts)
        trainer.train()
        logged.append(trainer.state.log_history[0])
        found.append(torch.cat([p.detach().flatten() for p in student.parameters()]))
    assert (
        found[0] - torch.cat([p.detach().flatten() for p in tiny_llama(1, num_hidden_layers=1).parameters()])
    ).norm() > 0.1
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
    for entry in logged:
        assert entry["loss"] == pytest.approx(entry["distillation_loss"] + 0.5 * entry["task_loss"], abs=1e-4)
    assert logged[1]["task_loss"] == pytest.approx(logged[0]["task_loss"], rel=1e-4)
    assert logged[1]["distillation_loss"] == pytest.approx(logged[0]["distillation_loss"], rel=1e-4)


def test_a_batch_without_labels_is_zero_with_gradients(tmp_path):
    data = [{"input_ids": torch.randint(3, 320, (6,))} for _ in range(4)]
    for example in data:
        example["labels"] = example["input_ids"].clone()
    data[1]["labels"][:] = -100
    dense, parts = tiny_llama(2, num_hidden_layers=1), {"logits": 1.0, "task": 0.5, "hidden": 0.5}
    moved = []
    for rows in (data, data[:1] + data[2:]):
        student = tiny_llama(1, num_hidden_layers=1)
        arguments = one_step(tmp_path, 1, len(rows))
        trainer = DistillationTrainer(student, arguments, train_dataset=rows, teacher=dense, distillation=parts)
        trainer.train()
        moved.append(torch.cat([p.detach().flatten() for p in student.parameters()]))
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-5, atol=1e-6)
    batch = {key: value[None] for key, value in data[1].items()}
    for items in (None, torch.tensor(0)):
        loss = made(student, dense, tmp_path).compute_loss(student, dict(batch), num_items_in_batch=items)
        loss.backward()
        assert loss == 0 and all(p.grad is not None and not p.grad.any() for p in student.parameters())


@pytest.fixture(scope="module")
def dropped():
    """A dense model and the same without blocks 1 and 3 of 5."""
    dense = tiny_llama(3, num_hidden_layers=5)
    plan = Plan("llama", stacks={"decoder": StackPlan(kept=(0, 2, 4))}, refit=False)
    return dense, hf_shrink.shrink(copy.deepcopy(dense), plan, progress=False)


def test_blocks_are_mapped_across_the_dropped_ones(dropped, tmp_path):
    dense, small = dropped
    (pair,) = pair_stacks(small, dense)
    assert (pair.kept, pair.behind) == ((0, 2, 4), (1, 3, 4))
    batch = {"input_ids": torch.randint(3, 320, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    batch["attention_mask"][0, 4:] = 0
    trainer = made(small, dense, tmp_path, {"logits": 0.0, "task": 0.0, "hidden": 2.0})
    found = trainer.compute_loss(small, dict(batch))
    with torch.no_grad():
        # Before the last norm: a hook of our own on the last block.
        states = [[], []]
        for model, kept in zip((small, dense), states, strict=True):
            hooks = [b.register_forward_hook(lambda m, a, o, k=kept: k.append(o)) for b in model.model.layers]
            model(**batch)
            for hook in hooks:
                hook.remove()
    real, errors = batch["attention_mask"].bool(), []
    for own, behind in zip(states[0], (1, 3, 4), strict=True):
        x, t = own[real].double(), states[1][behind][real].double()
        errors.append(((x - t).square().sum(-1) / t.square().sum(-1)).mean())
    torch.testing.assert_close(found.detach().double(), 2 * torch.stack(errors).mean(), rtol=1e-4, atol=1e-6)
    with pytest.raises(ArchitectureError, match="kept="):
        pair_stacks(tiny_llama(num_hidden_layers=3), dense)
    assert pair_stacks(tiny_llama(num_hidden_layers=3), dense, {"decoder": [1, 2, 3]})[0].behind == (1, 2, 4)
    with pytest.raises(ArchitectureError, match=r"\[3, 2, 1\]"):
        pair_stacks(tiny_llama(num_hidden_layers=3), dense, {"decoder": [3, 2, 1]})


def test_attention_of_blocks_with_all_heads(dropped, tmp_path):
    dense, small = dropped
    parts = {"logits": 0.0, "task": 0.0, "attention": 1.0}
    with pytest.raises(ArchitectureError, match="eager"):
        made(small, dense, tmp_path, parts)
    small, dense = copy.deepcopy(small), copy.deepcopy(dense)
    for model in (small, dense):
        model.set_attn_implementation("eager")
    batch = {"input_ids": torch.randint(3, 320, (2, 6))}
    loss, outputs = made(small, dense, tmp_path, parts).compute_loss(small, dict(batch), return_outputs=True)
    assert "attentions" not in outputs
    own, wanted = (model(**batch, output_attentions=True).attentions for model in (small, dense))
    errors = []
    for mine, number in zip(own, (0, 2, 4), strict=True):
        p, q = wanted[number].double(), mine.double()
        errors.append(torch.where(p > 0, p * (p.clamp_min(1e-30) / q.clamp_min(1e-30)).log(), 0.0).sum(-1).mean())
    torch.testing.assert_close(loss.double(), torch.stack(errors).mean(), rtol=1e-3, atol=1e-6)
    narrow = tiny_llama(num_hidden_layers=5, num_attention_heads=3)
    narrow.set_attn_implementation("eager")
    with pytest.raises(ArchitectureError, match="number of heads"):
        made(narrow, dense, tmp_path, parts).compute_loss(narrow, dict(batch))


def test_hidden_states_are_those_of_the_model_that_model_init_makes(tmp_path):
    data = [{"input_ids": torch.randint(3, 320, (6,))} for _ in range(4)]
    trainer = DistillationTrainer(
        args=one_step(tmp_path, 2, 1),
        model_init=lambda: tiny_llama(1, num_hidden_layers=2),
        train_dataset=data,
        teacher=tiny_llama(2, num_hidden_layers=2),
        distillation={"logits": 0.0, "task": 0.0, "hidden": 1.0},
    )
    first = trainer.model
    trainer.train()
    assert trainer.model is not first and trainer.state.log_history[0]["distillation_loss"] > 0


def test_what_cannot_be_compared_is_refused_with_the_remedy(dropped, tmp_path):
    dense, small = dropped
    batch = {"input_ids": torch.randint(3, 320, (2, 6))}
    with pytest.raises(RecipeError, match="did you mean 'temperature'"):
        made(small, dense, tmp_path, {"temprature": 2})
    with pytest.raises(RecipeError, match="teacher"):
        made(small, None, tmp_path)
    with pytest.raises(RecipeError, match="weight 0"):
        made(small, dense, tmp_path, {"logits": 0, "task": 0})
    wide = tiny_llama(num_hidden_layers=5, hidden_size=96)
    with pytest.raises(ArchitectureError, match="set hidden to 0"):
        made(wide, dense, tmp_path, {"hidden": 1.0}).compute_loss(wide, dict(batch, labels=batch["input_ids"]))
    other = tiny_llama(num_hidden_layers=1, vocab_size=330)
    with pytest.raises(CalibrationError, match="vocabulary"):
        made(other, dense, tmp_path).compute_loss(other, dict(batch))


def test_training_brings_the_student_nearer_and_logs_the_parts(dropped, tmp_path):
    dense, small = dropped
    small = copy.deepcopy(small)
    data = [{"input_ids": torch.randint(3, 320, (16,))} for _ in range(8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        max_steps=12,
        learning_rate=3e-3,
        logging_steps=6,
        per_device_eval_batch_size=2,
    )
    trainer = DistillationTrainer(
        small,
        arguments,
        train_dataset=data,
        eval_dataset=data,
        teacher=dense,
        distillation={**LOGITS, "hidden": 0.5},
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.8 * before
    logged = [entry for entry in trainer.state.log_history if "distillation_loss" in entry]
    assert len(logged) == 2 and logged[1]["distillation_loss"] < logged[0]["distillation_loss"]
