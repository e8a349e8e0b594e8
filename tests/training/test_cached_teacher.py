"""A teacher's largest probabilities on disk."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tiny import tiny_llama
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

from hf_shrink import CachedTeacher, CalibrationError, CheckpointError, DistillationTrainer, RecipeError, cache_teacher
from hf_shrink.training.distillation import cache


def examples(count: int = 11, length: int = 9) -> list[dict[str, torch.Tensor]]:
    """Token ids with padding on the right of every second example."""
    draw = torch.Generator().manual_seed(5)
    made = []
    for number in range(count):
        ids = torch.randint(3, 320, (length,), generator=draw)
        mask = torch.ones(length, dtype=torch.long)
        if number % 2:
            mask[-3:] = 0
        made.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return made


def trainer(folder: Path, student, data, **more):
    settings = {
        "per_device_train_batch_size": 3,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
    }
    settings.update(more.pop("settings", {}))
    arguments = TrainingArguments(
        output_dir=str(folder / "run"), use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", **settings
    )
    return DistillationTrainer(student, arguments, train_dataset=data, **more)


@pytest.fixture(scope="module")
def teacher():
    return tiny_llama(1, num_hidden_layers=2)


@pytest.fixture(scope="module")
def cached(teacher, tmp_path_factory: pytest.TempPathFactory) -> CachedTeacher:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "SHARD_ROWS", 20)
        return cache_teacher(teacher, examples(), tmp_path_factory.mktemp("cache") / "all", k=320, batch_size=4)


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_with_all_classes_it_teaches_as_the_teacher_itself(teacher, cached, tmp_path):
    assert len(cached.index.shards) > 2 and len(cached) == 11
    parts = {"logits": 1.0, "task": 0.25, "temperature": 1.0}
    found = []
    for source in (teacher, cached, str(cached.folder)):  # shuffled, in steps of two uneven batches
        student = tiny_llama(2, num_hidden_layers=1)
        settings = {"gradient_accumulation_steps": 2}
        trainer(tmp_path, student, examples(), teacher=source, distillation=parts, settings=settings).train()
        found.append(weights(student))
    untrained = weights(tiny_llama(2, num_hidden_layers=1))
    moved = (found[0] - untrained).norm()
    assert moved > 0.1
    assert (found[1] - found[0]).norm() < 0.02 * moved  # float16 probabilities, and Adam's signs
    assert torch.equal(found[2], found[1])


def test_the_teacher_is_as_it_was_and_the_folder_small(teacher, tmp_path):
    teacher.train()
    found = cache_teacher(teacher, examples(), tmp_path / "few", k=5, temperature=2.0)
    assert teacher.training
    teacher.eval()
    rows = sum(int(example["attention_mask"].sum()) - 1 for example in examples())
    size = sum(file.stat().st_size for file in (tmp_path / "few").iterdir())
    assert rows * 24 < size < rows * 24 + 3000
    assert (found.index.k, found.index.temperature, found.index.classes) == (5, 2.0, 320)


def test_other_data_is_refused(cached, tmp_path):
    other = examples()
    other[7]["input_ids"] = other[7]["input_ids"].flip(0)
    parts = {"logits": 1.0, "task": 0.0, "temperature": 1.0}
    with pytest.raises(CalibrationError, match="example 7"):
        trainer(tmp_path, tiny_llama(2), other, teacher=cached, distillation=parts, settings={"max_steps": 8}).train()
    with pytest.raises(RecipeError, match="11 examples"):
        trainer(tmp_path, tiny_llama(2), other[:5], teacher=cached, distillation=parts)
    with pytest.raises(RecipeError, match="temperature"):
        trainer(tmp_path, tiny_llama(2), other, teacher=cached, distillation={**parts, "temperature": 2.0})
    with pytest.raises(RecipeError, match="hidden"):
        trainer(tmp_path, tiny_llama(2), other, teacher=cached, distillation={**parts, "hidden": 1.0})
    with pytest.raises(CalibrationError, match="classes"):
        trainer(tmp_path, tiny_llama(2, vocab_size=330), examples(), teacher=cached, distillation=parts).train()


def test_what_cannot_be_cached(teacher, tmp_path):
    with pytest.raises(CalibrationError, match="lower k"):
        cache_teacher(teacher, examples(), tmp_path / "no", k=321)
    with pytest.raises(CalibrationError, match="empty"):
        cache_teacher(teacher, [], tmp_path / "no")
    unlabelled = [{**example, "labels": torch.full_like(example["labels"], -100)} for example in examples()]
    with pytest.raises(CalibrationError, match="no prediction of the batch counts"):
        cache_teacher(teacher, unlabelled, tmp_path / "no")
    assert not list(tmp_path.iterdir())  # nothing half written
    with pytest.raises(CheckpointError, match="cache_teacher"):
        CachedTeacher(tmp_path)


@pytest.mark.parametrize("problem", [None, "multi_label_classification", "regression"])
def test_heads_that_do_not_choose_one_class_cannot_be_cached(problem, tmp_path):
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 40}
    config = BertConfig(vocab_size=60, num_labels=4, problem_type=problem, **sizes)
    rows = [{"input_ids": torch.randint(5, 60, (6,)), "labels": torch.ones(4)} for _ in range(3)]
    with pytest.raises(CalibrationError, match="no distribution over classes"):
        cache_teacher(BertForSequenceClassification(config), rows, tmp_path / "no", k=2)


def test_a_damaged_or_missing_file_is_found_at_once(cached, tmp_path):
    for change in (lambda path: path.write_bytes(path.read_bytes()[:-1]), Path.unlink):
        folder = tmp_path / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(cached.folder, folder)
        change(folder / cached.index.shards[-1][0])
        with pytest.raises(CheckpointError, match=rf"{cached.index.shards[-1][0]}.*cache_teacher\(\) again"):
            CachedTeacher(folder)
