"""`ShrinkCallback` in the company of everything that a Trainer does, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import yaml
from conformance.cases_mixtures import MIXTURES
from tiny import tiny_llama
from torch._dynamo.utils import counters
from training.trained import TASKS, image, language, outputs, quantize, tiny_vit, trainer, weights, width
from transformers import TrainerCallback

import hf_shrink
from hf_shrink import ArchitectureError, Recipe, RecipeError, ShrinkCallback, ShrinkError, prune_weights


def small(model: Any) -> float:
    """The fraction of a tiny Llama's parameters in blocks that is gone."""
    left = sum(p.numel() for p in model.model.layers.parameters())
    return 1 - left / sum(p.numel() for p in tiny_llama(num_hidden_layers=2).model.layers.parameters())


@pytest.mark.parametrize("method", ["taylor", "fisher", "movement", "magnitude"])
def test_the_ratio_is_met_portably_and_stock_sizes_are_in_the_config(method: str, tmp_path: Path) -> None:
    model = tiny_llama(num_hidden_layers=2)
    run = trainer(model, language, tmp_path, [ShrinkCallback(width(0.3, method), portable=True)])
    run.train()
    assert small(model) == pytest.approx(0.3, abs=0.02)
    assert model.shrink_report.portable and not model.config.hf_shrink["shapes"]
    assert model.config.intermediate_size < 80
    assert model.shrink_report.parameters_after == sum(p.numel() for p in model.parameters())
    model.generate(torch.tensor([[5, 6]]), max_new_tokens=3)


SETTINGS: dict[str, dict[str, Any]] = {
    "accumulation": {"gradient_accumulation_steps": 2},
    "bfloat16": {"bf16": True},
    "checkpointing": {"activation_checkpointing": True},
    "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    model = tiny_llama(num_hidden_layers=2)
    trainer(model, language, tmp_path_factory.mktemp("plain"), [ShrinkCallback(width())]).train()
    return outputs(model, language)


@pytest.mark.parametrize("name", SETTINGS)
def test_in_company(name: str, plain: dict[str, torch.Tensor], tmp_path: Path) -> None:
    model = tiny_llama(num_hidden_layers=2)
    run = trainer(model, language, tmp_path, [ShrinkCallback(width())], **SETTINGS[name])
    counters.clear()
    run.train()
    if name == "compiled":  # once with the scores, once when the masks have settled
        assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    assert small(model) == pytest.approx(0.3, abs=0.05)
    found = outputs(model, language)
    if name in ("checkpointing", "compiled"):  # ways to compute the same
        torch.testing.assert_close(found["logits"], plain["logits"], rtol=1e-3, atol=1e-3)
    metrics = run.evaluate()
    assert metrics["eval_loss"] == pytest.approx(float(found["loss"]), rel=0.2)
    run.save_model()
    loaded, weights = type(model).from_pretrained(tmp_path), model.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in loaded.state_dict().items())


@pytest.mark.parametrize("modules", [["q_proj", "down_proj"], "all-linear"])
def test_adapters_are_merged_and_the_small_model_is_saved(modules: Any, tmp_path: Path) -> None:
    base = tiny_llama(num_hidden_layers=2)
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=modules))
    run = trainer(model, language, tmp_path, [ShrinkCallback(width())])
    run.train()
    assert small(base) == pytest.approx(0.3, abs=0.05)
    assert type(base.model.layers[0].mlp.down_proj) is torch.nn.Linear
    run.save_model()
    loaded = type(base).from_pretrained(tmp_path)
    torch.testing.assert_close(outputs(loaded, language)["logits"], outputs(model, language)["logits"])
    with pytest.raises(ShrinkError, match="new Trainer"):
        run.train()


def test_adapters_of_a_classifier_keep_its_trained_head(tmp_path: Path) -> None:
    build, make = TASKS["sequence classification"]
    base = build()
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_lin", "lin2"])
    model = peft.get_peft_model(base, config)
    run = trainer(model, make, tmp_path, [ShrinkCallback(width())])
    run.train()
    found = outputs(model, make)
    run.save_model()
    torch.testing.assert_close(outputs(type(base).from_pretrained(tmp_path), make)["logits"], found["logits"])
    with pytest.raises(ArchitectureError, match="cannot be merged"):
        prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        trainer(peft.get_peft_model(tiny_llama(), prompts), language, tmp_path, [ShrinkCallback(width())])


@pytest.mark.parametrize(
    ("method", "amount", "zeros"),
    [
        ("magnitude", {"threshold": 0.1}, None),
        ("magnitude", {"sparsity": 0.5, "granularity": "row"}, 0.5),
        ("movement", {"sparsity": 0.5}, 0.5),
        ("taylor", {"pattern": "2:4"}, 0.5),
    ],
)
def test_single_weights_go_gradually_and_stay_zero(method: str, amount: Any, zeros: Any, tmp_path: Path) -> None:
    model = tiny_llama(num_hidden_layers=2)
    callback = ShrinkCallback(weights(method, **amount), every=2)
    run = trainer(model, language, tmp_path, [callback])
    run.train()
    logged = [entry["shrink_sparsity"] for entry in run.state.log_history if "shrink_sparsity" in entry]
    assert logged == sorted(logged) and logged[0] == 0 < logged[3] < logged[-1]
    matrices = {n: p for n, p in model.named_parameters() if "_proj" in n}
    if zeros is not None:
        assert all(float((p == 0).float().mean()) == pytest.approx(zeros, abs=1e-3) for p in matrices.values())
    if "pattern" in amount:
        assert all(((p != 0).view(len(p), -1, 4).sum(-1) <= 2).all() for p in matrices.values())
    run.save_model()
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert set(model.shrink_record.plan.weights.amounts) == set(matrices)


def test_frozen_matrices_are_no_matter_of_gradients_and_their_zeros_count(tmp_path: Path) -> None:
    def frozen(recipe: Any) -> Any:
        model = tiny_llama(num_hidden_layers=2)
        model.model.layers[0].requires_grad_(False)
        trainer(model, language, tmp_path, [ShrinkCallback(recipe)]).train()
        return model

    with pytest.raises(RecipeError, match=r"layers\.0\.self_attn\.q_proj\.weight has none .* or use magnitude"):
        frozen(weights("taylor", sparsity=0.5))
    others = frozen(weights("taylor", sparsity=0.5, ignore=[r"re:.*layers\.0\.", "lm_head"]))
    assert len(others.shrink_record.plan.weights.amounts) == 7
    model = frozen(weights(sparsity=0.5))
    assert all(float((p == 0).float().mean()) == 0.5 for n, p in model.named_parameters() if "_proj" in n)
    assert "50.00% of the weights in 14 matrices are zero" in model.shrink_report.notes


def test_zeros_that_are_there_stay_and_are_saved(tmp_path: Path) -> None:
    model = tiny_llama(num_hidden_layers=2)
    with pytest.raises(RecipeError, match="no zeros"):
        trainer(model, language, tmp_path, [ShrinkCallback()])
    prune_weights(model, sparsity=0.5)
    zeros = {n: p == 0 for n, p in model.named_parameters()}
    before = model.lm_head.weight.detach().clone()
    run = trainer(model, language, tmp_path, [ShrinkCallback()])
    run.train()
    run.save_model()
    loaded = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(p == 0, zeros[n]) for n, p in loaded.named_parameters())
    assert not torch.equal(loaded.lm_head.weight, before)
    assert run.state.log_history[0]["shrink_sparsity"] == pytest.approx(0.5, abs=0.01)


class Best(TrainerCallback):
    """Writes down what the Trainer takes for the best, after every save."""

    def __init__(self) -> None:
        self.seen: dict[int, Any] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen[state.global_step] = state.best_model_checkpoint


def test_the_best_model_is_one_from_after_the_schedule(tmp_path: Path) -> None:
    # Evaluated and saved after every step; by the metric the first model is the best.
    model = tiny_vit()
    best = Best()
    callback = ShrinkCallback(width(0.5), start=0.0, end=0.5)
    run = trainer(
        model,
        image,
        tmp_path,
        [callback, best],
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="units",
        greater_is_better=True,
    )
    run.compute_metrics = lambda predicted: {"units": -run.state.global_step}
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")  # the schedule ends at step 4 of 8
    assert all(best.seen[step] is None for step in range(4))
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in tiny_vit().parameters())


def test_stopped_before_the_end_nothing_is_cut(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 3

    model = tiny_llama(num_hidden_layers=2)
    run = trainer(model, language, tmp_path, [ShrinkCallback(width()), Stop()])
    run.train()
    assert small(model) == 0 and not hasattr(model, "shrink_report")
    assert math.isfinite(run.evaluate()["eval_loss"])
    again = ShrinkCallback(width())  # of what was given up no mask stays
    trainer(model, language, tmp_path, [again]).train()
    assert small(model) == pytest.approx(0.3, abs=0.05)
    other = tiny_llama(num_hidden_layers=2)
    trainer(other, language, tmp_path, [again]).train()  # the same callback for another model
    assert small(other) == pytest.approx(0.3, abs=0.05)


def test_late_and_made_anew_and_first_among_callbacks(tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []

    class Logger(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append(dict(logs))

    model = tiny_llama(num_hidden_layers=2)
    run = trainer(model, language, tmp_path, [Logger()], torch_compile=True, torch_compile_backend="eager")
    run.add_callback(ShrinkCallback(width()))  # needs no parameters: may come late
    run.train()
    assert small(model) > 0.2 and not any("shrink_sparsity" in logs for logs in seen)
    model = tiny_llama(num_hidden_layers=2)
    run = trainer(model, language, tmp_path, [Logger()])
    ShrinkCallback(width()).attach(run)
    run.train()
    assert small(model) > 0.2 and any("shrink_sparsity" in logs for logs in seen)
    run = trainer(tiny_llama(num_hidden_layers=2), language, tmp_path, [ShrinkCallback(width())])
    run.model_init = lambda: tiny_llama(num_hidden_layers=2)  # makes a new model when training begins
    run.train()
    assert small(run.model) > 0.2


REFUSED: dict[str, tuple[Any, str]] = {
    "one cut": ({"steps": [{"prune": {"what": "depth", "method": "kl_greedy", "blocks": 1}}]}, "run `shrink`"),
    "calibration": (width(method="obs"), "needs calibration data"),
    "unknown method": (width(method="tailor"), "taylor"),
    "unknown option": (width(decai=0.5), "decay"),
    "a bad option": (width(decay=1.5), "below 1"),
    "weights by data": (weights("wanda", sparsity=0.5), "calibration data"),
    "two at once": ({"steps": [*width()["steps"], *weights(sparsity=0.5)["steps"]]}, "first"),
    "a budget": ({"budget": {"bytes": "30%"}}, "budget"),
    "a dtype": ({**width(), "dtype": "bfloat16"}, "dtype"),
    "granularity": (weights("taylor", sparsity=0.5, granularity="block"), "granularity"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_training(name: str) -> None:
    recipe, message = REFUSED[name]
    with pytest.raises(RecipeError, match=message):
        ShrinkCallback(recipe)


def test_portable_is_what_the_recipe_says_unless_the_argument_says_it(tmp_path: Path) -> None:
    for said in (True, False):
        recipe = {"portable": said, **width()}
        (tmp_path / "own.yaml").write_text(yaml.safe_dump(recipe))
        for form in (recipe, tmp_path / "own.yaml", Recipe.from_dict(recipe)):
            found = [ShrinkCallback(form, portable=asked).recipe for asked in (None, True, False)]
            assert [recipe is not None and recipe.portable for recipe in found] == [said, True, False]
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(width()))
    for silent in (width(), tmp_path / "own.yaml", "w4a16"):
        recipe = ShrinkCallback(silent).recipe
        assert recipe is not None and not recipe.portable


def test_refused_for_the_model(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="would leave nothing"):
        trainer(tiny_llama(), language, tmp_path, [ShrinkCallback(width(0.99))])
    mixture = MIXTURES["mixtral"]()
    for recipe in (width(), weights(sparsity=0.5)):
        with pytest.raises(ArchitectureError, match="mixture of experts"):
            trainer(mixture, language, tmp_path, [ShrinkCallback(recipe)])
    adapted = peft.get_peft_model(tiny_llama(), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    with pytest.raises(ShrinkError, match="adapters are added"):
        trainer(adapted, language, tmp_path, [ShrinkCallback(weights(sparsity=0.5))])
    with pytest.raises(ArchitectureError, match="transformers model"):
        trainer(torch.nn.Linear(2, 2), language, tmp_path, [ShrinkCallback(width())])  # type: ignore[arg-type]


def test_a_second_one_is_refused_before_training(tmp_path: Path) -> None:
    first, second = ShrinkCallback(width()), ShrinkCallback(quantize())
    with pytest.raises(ShrinkError, match=r"two ShrinkCallbacks, .* one ShrinkCallback a recipe"):
        trainer(tiny_llama(), language, tmp_path, [first, second])
    run = trainer(tiny_llama(), language, tmp_path, [first])
    late = ShrinkCallback(weights(sparsity=0.5))
    run.add_callback(late)
    with pytest.raises(ShrinkError, match="two ShrinkCallbacks"):
        run.train()
    assert run.state.global_step == 0
    run.remove_callback(first)
    run.train()  # one in the place of the other
    assert run.model.shrink_record.plan.weights is not None


def test_deepspeed_is_refused() -> None:
    args: Any = SimpleNamespace(deepspeed={"zero_optimization": {"stage": 3}})
    with pytest.raises(ShrinkError, match="DeepSpeed"):
        ShrinkCallback(width()).on_init_end(args, None, None, model=tiny_llama())  # type: ignore[arg-type]


def test_it_is_exported_and_only_imported_when_asked_for() -> None:
    assert hf_shrink.ShrinkCallback is ShrinkCallback and "ShrinkCallback" in hf_shrink.__all__
    with pytest.raises(AttributeError, match="no attribute 'Shrinkcallback'"):
        _ = hf_shrink.Shrinkcallback
