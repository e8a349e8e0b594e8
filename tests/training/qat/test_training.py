"""A quantize step carried out by a Trainer: what is trained, packed, saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conformance.cases_mixtures import MIXTURES
from stock import Stock
from tiny import QUICK_GPTQ, tiny_llama
from torch import Tensor
from training.trained import TASKS, image, language, outputs, quantize, tiny_vit, trainer, weights, width
from transformers import TrainerCallback

import hf_shrink
from hf_shrink import CalibrationError, DistillationTrainer, RecipeError, ShrinkCallback, ShrinkError
from hf_shrink.architectures.binding import bind
from hf_shrink.evaluation.size import unique_bytes
from hf_shrink.pipeline.recipes import load_recipe
from hf_shrink.reporting.layout import layout_of
from hf_shrink.runtime.linear import CompressedLinear
from hf_shrink.training.qat.adapters import merged_weight
from hf_shrink.training.qat.plan import plan_training


class Before(TrainerCallback):
    """Keeps what the model says when training ends, before anything is packed: it comes in front of ShrinkCallback."""

    def __init__(self, make: Any = language) -> None:
        self.make = make
        self.said: dict[str, Tensor] = {}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.said = outputs(kwargs["model"], self.make)


SCHEMES: dict[str, dict[str, Any]] = {
    "W4": quantize(),
    "W2 with zero points": quantize("W2A16", symmetric=False),
    "W3 per channel": quantize("W3A16", strategy="channel"),
    "W8A8": quantize("W8A8"),
    "W4 and a head in W8": quantize(head="W8A16"),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_what_is_saved_is_what_was_trained(name: str, tmp_path: Path) -> None:
    model, before = tiny_llama(num_hidden_layers=2, tie_word_embeddings="head" in name), Before()
    run = trainer(model, language, tmp_path, [before, ShrinkCallback(SCHEMES[name], start=0.25)], max_steps=16)
    dense = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < 0.8 * dense
    logits = outputs(model, language)["logits"]
    torch.testing.assert_close(logits, before.said["logits"], rtol=0, atol=1e-4)
    assert isinstance(model.model.layers[1].mlp.down_proj, CompressedLinear)
    run.save_model()
    loaded = type(model).from_pretrained(tmp_path, quantization_config=hf_shrink.LoadingConfig(optimize=False))
    torch.testing.assert_close(outputs(loaded, language)["logits"], logits, rtol=0, atol=1e-5)
    assert loaded.shrink_record.plan.schemes == model.shrink_record.plan.schemes
    logged = [entry["shrink_effective_bits"] for entry in run.state.log_history if "shrink_effective_bits" in entry]
    assert logged[0] == 32 and logged[-1] < 20
    report = model.shrink_report
    assert logged[-1] == pytest.approx(8 * report.bytes_after / report.parameters_after, rel=0.02)


def test_stock_transformers_loads_it(stock_process: Stock, tmp_path: Path) -> None:
    model = tiny_llama(num_hidden_layers=2)
    run = trainer(model, language, tmp_path, [ShrinkCallback(quantize(), start=0)])
    run.train()
    assert model.shrink_report.portable
    run.save_model()
    ids = torch.arange(3, 27).view(2, 12)
    with torch.no_grad():
        logits = model(ids).logits
    stock = stock_process.logits(tmp_path, type(model).__name__, ids.tolist())
    torch.testing.assert_close(stock, logits, rtol=0, atol=1e-4)


SETTINGS: dict[str, dict[str, Any]] = {
    "accumulation": {"gradient_accumulation_steps": 2},
    "bfloat16": {"bf16": True},
    "checkpointing": {"activation_checkpointing": True},
    "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    model = tiny_llama(num_hidden_layers=1)
    trainer(model, language, tmp_path_factory.mktemp("plain"), [ShrinkCallback(quantize(), start=0.25)]).train()
    return outputs(model, language)


@pytest.mark.parametrize("name", SETTINGS)
def test_in_company(name: str, plain: dict[str, Tensor], tmp_path: Path) -> None:
    model, before = tiny_llama(num_hidden_layers=1), Before()
    run = trainer(model, language, tmp_path, [before, ShrinkCallback(quantize(), start=0.25)], **SETTINGS[name])
    run.train()
    found = outputs(model, language)
    if name in ("checkpointing", "compiled"):  # ways to compute the same
        torch.testing.assert_close(found["logits"], plain["logits"], rtol=1e-3, atol=1e-3)
    if name != "bfloat16":  # where the Trainer's autocast is around the model until the end
        torch.testing.assert_close(found["logits"], before.said["logits"], rtol=0, atol=1e-4)
    assert all(type(m) is CompressedLinear for n, m in model.model.layers.named_modules() if n.endswith("proj"))


def test_a_model_in_bfloat16_keeps_its_scales_in_bfloat16(tmp_path: Path) -> None:
    model, before = tiny_llama(num_hidden_layers=1).bfloat16(), Before()
    run = trainer(model, language, tmp_path, [before, ShrinkCallback(quantize("W3A16", symmetric=False), start=0)])
    run.train()
    assert model.model.layers[0].mlp.down_proj.weight_scale.dtype == torch.bfloat16
    assert torch.equal(outputs(model, language)["logits"], before.said["logits"])


def test_the_best_checkpoint_is_packed_with_its_own_scales(tmp_path: Path) -> None:
    model = tiny_llama(num_hidden_layers=1)
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    run = trainer(
        model,
        language,
        tmp_path,
        [ShrinkCallback(quantize(), start=0.25)],
        load_best_model_at_end=True,
        learning_rate=1.0,  # so that training makes it worse
        lr_scheduler_type="constant",
        **settings,
    )
    run.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry}
    best = min(losses, key=lambda step: losses[step] if step >= 2 else float("inf"))
    assert run.state.best_global_step == best < 8
    assert run.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-5)
    assert isinstance(model.model.layers[0].mlp.down_proj, CompressedLinear)


def test_a_dense_teacher_leads_a_student_of_few_bits(tmp_path: Path) -> None:
    dense, model, before = tiny_llama(num_hidden_layers=1), tiny_llama(num_hidden_layers=1), Before()
    plain = trainer(model, language, tmp_path)  # for its arguments and rows
    run = DistillationTrainer(
        model,
        plain.args,
        train_dataset=plain.train_dataset,
        teacher=dense,
        distillation={"logits": 1.0, "task": 0.0},
        callbacks=[before, ShrinkCallback(quantize("W2A16"), start=0)],
    )
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]  # the first step's is that of rounding alone: both have the same weights
    torch.testing.assert_close(outputs(model, language)["logits"], before.said["logits"], rtol=0, atol=1e-4)


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.step


RESUMED: dict[str, tuple[dict[str, Any], float]] = {
    "from the first step": (quantize(), 0.0),
    "with zero points, later": (quantize("W3A16", symmetric=False), 0.5),
    "with masks": ({"steps": weights(sparsity=0.5)["steps"] + quantize()["steps"]}, 0.1),
}


@pytest.mark.parametrize("name", ["with masks", *(pytest.param(n, marks=pytest.mark.slow) for n in list(RESUMED)[:2])])
def test_resumed_is_unbroken(name: str, tmp_path: Path) -> None:
    recipe, start = RESUMED[name]

    def train(folder: Path, stop: int = 0, resume: bool = False) -> dict[str, Tensor]:
        model = tiny_llama(num_hidden_layers=1, attention_dropout=0.1)
        callbacks = [ShrinkCallback(recipe, start=start, end=0.5), *([StopAt(stop)] if stop else [])]
        run = trainer(model, language, folder, callbacks, save_strategy="steps", save_steps=1, max_steps=6)
        run.train(resume_from_checkpoint=resume or None)
        return {key: tensor.clone() for key, tensor in model.state_dict().items()}

    unbroken = train(tmp_path / "unbroken")
    assert "model.layers.0.mlp.down_proj.weight_packed" in unbroken
    for stop in (1, 3, 5):
        train(tmp_path / str(stop), stop=stop)
        resumed = train(tmp_path / str(stop), resume=True)
        assert unbroken.keys() == resumed.keys()
        assert all(torch.equal(value, resumed[key]) for key, value in unbroken.items()), stop


def test_zeros_of_a_prune_step_stay_zeros(tmp_path: Path) -> None:
    model = tiny_llama(num_hidden_layers=2)
    recipe = {"steps": weights(pattern="2:4")["steps"] + quantize("W4A16", symmetric=False)["steps"]}
    before = Before()
    run = trainer(model, language, tmp_path, [before, ShrinkCallback(recipe, start=0.1, end=0.5)])
    run.train()
    torch.testing.assert_close(outputs(model, language)["logits"], before.said["logits"], rtol=0, atol=1e-4)
    for layer in model.model.layers:
        weight = layer.mlp.gate_proj.weight
        assert layer.mlp.gate_proj.sparse
        assert ((weight.view(-1, 4) != 0).sum(1) <= 2).all() and (weight != 0).float().mean() > 0.4
    assert model.shrink_record.plan.weights is not None and model.shrink_record.plan.schemes


def test_dense_figures_are_those_of_the_model_before_training(tmp_path: Path) -> None:
    recipe = {"steps": weights(sparsity=0.5)["steps"] + quantize("W4A16", symmetric=False)["steps"]}
    model = tiny_llama(num_hidden_layers=2)
    parameters, weight_bytes = sum(p.numel() for p in model.parameters()), unique_bytes(model)
    prunable = sum(p.numel() for name, p in model.named_parameters() if "_proj" in name)
    layout = [block.to_dict() for block in layout_of(bind(model))]
    run = trainer(model, language, tmp_path, [ShrinkCallback(recipe, start=0.1, end=0.5)])
    run.train()
    report, logged = model.shrink_report, [entry for entry in run.state.log_history if "loss" in entry]
    assert (report.parameters_before, report.bytes_before) == (parameters, weight_bytes)
    assert report.parameters_after == parameters and report.bytes_after < 0.6 * weight_bytes
    assert report.layout == layout
    assert logged[0]["shrink_parameters"] == parameters
    assert logged[-1]["shrink_parameters"] == pytest.approx(parameters - 0.5 * prunable, rel=1e-3)
    card = model.shrink_record.card
    assert f"| Parameters | {parameters / 1000:.1f}K | {parameters / 1000:.1f}K |" in card


@pytest.mark.parametrize("name", ["groups", "channels and inputs"])
def test_heads_and_channels_go_first_and_what_is_left_is_rounded(name: str, tmp_path: Path) -> None:
    few = quantize("W4A16", symmetric=False) if name == "groups" else quantize("W8A8")
    recipe = {"steps": width(0.4, "movement")["steps"] + few["steps"]}

    def train(folder: Path, stop: int = 0, resume: bool = False) -> tuple[Any, dict[str, Tensor]]:
        model, before = tiny_llama(num_hidden_layers=2), Before()
        callbacks = [before, ShrinkCallback(recipe, start=0.1, end=0.5), *([StopAt(stop)] if stop else [])]
        run = trainer(model, language, folder, callbacks, save_strategy="steps", save_steps=2)
        run.train(resume_from_checkpoint=resume or None)
        return model, before.said

    model, said = train(tmp_path)
    torch.testing.assert_close(outputs(model, language)["logits"], said["logits"], rtol=0, atol=1e-4)
    down = model.model.layers[1].mlp.down_proj
    assert isinstance(down, CompressedLinear) and down.in_features < 80
    assert (
        model.shrink_record.plan.stacks
        and model.shrink_record.plan.schemes["model.layers.1.mlp.down_proj"] == down.scheme
    )
    model.save_pretrained(tmp_path / "saved")
    loaded = type(model).from_pretrained(
        tmp_path / "saved", quantization_config=hf_shrink.LoadingConfig(optimize=False)
    )
    torch.testing.assert_close(outputs(loaded, language)["logits"], said["logits"], rtol=0, atol=1e-4)
    train(tmp_path / "6", stop=6)
    resumed, _ = train(tmp_path / "6", resume=True)
    for key, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_adapters_are_part_of_the_weight_that_is_rounded(tmp_path: Path) -> None:
    base = tiny_llama(num_hidden_layers=2)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(base, config)
    before = Before()
    run = trainer(
        model, language, tmp_path, [before, ShrinkCallback(quantize(), start=0.25)], save_strategy="steps", save_steps=4
    )
    dense = run.evaluate()["eval_loss"]
    run.train()
    assert type(base.model.layers[0].mlp.down_proj) is CompressedLinear
    torch.testing.assert_close(outputs(base, language)["logits"], before.said["logits"], rtol=0, atol=1e-4)
    assert run.evaluate()["eval_loss"] < dense
    run.save_model(str(tmp_path / "saved"))
    loaded = type(base).from_pretrained(tmp_path / "saved", quantization_config=hf_shrink.LoadingConfig(optimize=False))
    torch.testing.assert_close(outputs(loaded, language)["logits"], before.said["logits"], rtol=0, atol=1e-4)

    again = tiny_llama(num_hidden_layers=2)
    resumed = trainer(peft.get_peft_model(again, config), language, tmp_path, [ShrinkCallback(quantize(), start=0.25)])
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for key, value in base.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


def test_adapters_on_a_model_in_bfloat16_are_merged_as_they_were_trained(tmp_path: Path) -> None:
    class Merged(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for path, layer in paths.items():
                found = base.get_submodule(path).base_layer.weight_quantizer.quantized(merged_weight(layer))
                trained[path] = found.values.clone()

    base = tiny_llama(num_hidden_layers=1).bfloat16()
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(base, config)
    paths = {n: m for n, m in base.named_modules() if n.endswith(("q_proj", "down_proj"))}
    trained: dict[str, Tensor] = {}
    recipe = quantize("W8A16", strategy="channel")
    trainer(model, language, tmp_path, [Merged(), ShrinkCallback(recipe, start=0)]).train()
    for path, values in trained.items():
        packed = base.get_submodule(path)
        assert isinstance(packed, CompressedLinear) and torch.equal(packed.unpacked()[0], values), path


@pytest.mark.parametrize("kind", ["plain", "tied head", "adapters"])
def test_a_training_that_was_given_up_leaves_nothing_in_the_way_of_the_next(kind: str, tmp_path: Path) -> None:
    class GiveUp(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    base = tiny_llama(num_hidden_layers=1, tie_word_embeddings=kind == "tied head")
    model: Any = base
    if kind == "adapters":
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"])
        model = peft.get_peft_model(base, config)
    recipe = quantize(head="W8A16") if kind == "tied head" else quantize()
    before, names = outputs(model, language)["logits"], set(model.state_dict())
    still = {"learning_rate": 0.0, "weight_decay": 0.0, "max_steps": 2}
    run = trainer(model, language, tmp_path, [ShrinkCallback(recipe, start=0), GiveUp()], **still)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    attached = set(model.state_dict())
    assert not torch.equal(outputs(model, language)["logits"], before)  # it rounds
    said = Before()
    again = trainer(model, language, tmp_path, [said, ShrinkCallback(recipe, start=0)], **still)
    assert set(model.state_dict()) == attached > names
    assert torch.equal(outputs(model, language)["logits"], before)  # until rounding begins anew
    again.train()
    assert type(base.model.layers[0].mlp.down_proj) is CompressedLinear
    torch.testing.assert_close(outputs(base, language)["logits"], said.said["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (peft.LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.1), "lora_dropout"),
        (peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True), "variant"),
        (peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "of the kind"),
    ],
)
def test_adapters_that_no_weight_can_hold_are_refused(config: Any, reason: str, tmp_path: Path) -> None:
    model = peft.get_peft_model(tiny_llama(num_hidden_layers=1), config)
    with pytest.raises(RecipeError, match=reason):
        trainer(model, language, tmp_path, [ShrinkCallback(quantize())])


def test_calibration_data_lets_a_method_with_statistics_choose_the_start(tmp_path: Path) -> None:
    batches = [{"input_ids": torch.randint(5, 300, (4, 16))} for _ in range(4)]
    recipe = quantize(**{**QUICK_GPTQ, "scheme": "W3A16", "group_size": 16})
    weights_of = {}
    for name, data in (("data", batches), ("none", None)):
        model = tiny_llama(num_hidden_layers=1)
        callback = ShrinkCallback(recipe, start=0, calibration=data)
        run = trainer(model, language, tmp_path, [callback], learning_rate=0.0, weight_decay=0.0, max_steps=1)
        run.train()
        weights_of[name] = {n: m.weight for n, m in model.named_modules() if isinstance(m, CompressedLinear)}
        assert any(
            ("by gptq on calibration" if data else "by rtn without data") in note for note in model.shrink_report.notes
        )
    expected = hf_shrink.shrink(tiny_llama(num_hidden_layers=1), recipe, calibration=batches, optimize=False)
    for path, weight in weights_of["data"].items():
        torch.testing.assert_close(weight, expected.get_submodule(path).weight, rtol=1e-6, atol=1e-7)
        assert not torch.allclose(weight, weights_of["none"][path])


@pytest.mark.parametrize("task", ["sequence to sequence", "image classification", "speech recognition"])
def test_other_tasks(task: str, tmp_path: Path) -> None:
    build, make = TASKS[task]
    model, before = build(), Before(make)
    run = trainer(model, make, tmp_path, [before, ShrinkCallback(quantize("W4A16", group_size=8), start=0.25)])
    run.train()
    found = outputs(model, make)
    torch.testing.assert_close(found["logits"], before.said["logits"], rtol=0, atol=1e-4)


def test_a_late_callback_is_refused_with_the_remedy(tmp_path: Path) -> None:
    run = trainer(tiny_llama(num_hidden_layers=1), language, tmp_path)
    run.add_callback(ShrinkCallback(quantize()))
    with pytest.raises(ShrinkError, match=r"attach\(trainer\)"):
        run.train()
    model = tiny_llama(num_hidden_layers=1)
    run = trainer(model, language, tmp_path)
    ShrinkCallback(quantize()).attach(run)
    run.train()
    assert type(model.model.layers[0].mlp.up_proj) is CompressedLinear


def test_several_gpus_in_one_process_are_refused(tmp_path: Path) -> None:
    run = trainer(tiny_llama(num_hidden_layers=1), language, tmp_path, [ShrinkCallback(quantize())])
    run.args._n_gpu = 2
    with pytest.raises(ShrinkError, match="torchrun"):
        run.train()


def test_calibration_beside_a_prune_step_is_refused(tmp_path: Path) -> None:
    recipe = {"steps": weights(sparsity=0.5)["steps"] + quantize(**QUICK_GPTQ)["steps"]}
    callback = ShrinkCallback(recipe, calibration=[{"input_ids": torch.ones(1, 8, dtype=torch.long)}])
    with pytest.raises(CalibrationError, match="prune step first"):
        trainer(tiny_llama(num_hidden_layers=1), language, tmp_path, [callback])


@pytest.mark.parametrize(
    "recipe", ["w8a8", {"steps": [{"quantize": {"effort": "balanced", "scheme": "W8A8"}}]}], ids=str
)
def test_what_shifts_inputs_is_trained_without(recipe: Any) -> None:
    planned = plan_training(tiny_llama(num_hidden_layers=1), load_recipe(recipe))
    assert planned.plan.schemes and not planned.plan.transforms
    assert any("inputs were not shifted before training" in note for note in planned.notes)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"steps": [{"quantize": {"effort": "best"}}]}, "effort: balanced"),
        ({"steps": [{"quantize": {"method": "gptq", "transforms": ["awq"]}}]}, "transforms"),
        (quantize("FP8A16"), "integer scheme"),
        ({"steps": [{"quantize": {"method": "bitsandbytes", "scheme": "NF4"}}]}, "bitsandbytes"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_training(recipe: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=said):
        trainer(tiny_llama(num_hidden_layers=1), language, tmp_path, [ShrinkCallback(recipe)])


def test_experts_in_3d_parameters_are_refused(tmp_path: Path) -> None:
    model = next(iter(MIXTURES.values()))()
    with pytest.raises(RecipeError, match="experts"):
        trainer(model, language, tmp_path, [ShrinkCallback(quantize("W4A16", group_size=8))])


def test_an_embedding_and_a_tower_of_pixels(tmp_path: Path) -> None:
    model, before = tiny_vit(), Before(image)
    recipe = quantize("W8A16", strategy="channel", targets=["Linear"])
    run = trainer(model, image, tmp_path, [before, ShrinkCallback(recipe, start=0)])
    run.train()
    torch.testing.assert_close(outputs(model, image)["logits"], before.said["logits"], rtol=0, atol=1e-4)
