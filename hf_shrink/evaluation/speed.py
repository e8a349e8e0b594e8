"""How fast loaded models generate, or run forward, here and now, their runs in turn."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from hf_shrink.errors import ArchitectureError, RecipeError
from hf_shrink.evaluation import timing
from hf_shrink.evaluation.greedy import greedy_config
from hf_shrink.evaluation.made_up import Inputs, generates, made_up_inputs, positions, reading_made_up
from hf_shrink.evaluation.timing import Seconds
from hf_shrink.progress import ProgressCallback, quiet
from hf_shrink.speed_report import Timing

WARMUP_TOKENS = 4


@dataclass(frozen=True)
class Workload:
    """What is run.

    Attributes:
        prompt: tokens of the prompt; for models that do not generate, of the input.
        new: tokens made after it, exactly, one at a time and greedily.
        prefill: tokens of a long prompt, of which one token is made; 0 leaves it out.
        batch: sequences at once.
        repeats: timed runs, after one to warm up.

    Raises:
        RecipeError: nothing would be left to time.
    """

    prompt: int = 64
    new: int = 128
    prefill: int = 512
    batch: int = 1
    repeats: int = 5

    def __post_init__(self) -> None:
        for name, least in (("prompt", 1), ("new", 2), ("prefill", 0), ("batch", 1), ("repeats", 1)):
            if getattr(self, name) < least:
                raise RecipeError(f"{name} is {getattr(self, name)}; to measure speed it has to be at least {least}")

    def fitted(self, models: Iterable[Any]) -> Workload:
        """The same with no more tokens than every one of `models` has positions for."""
        found = self
        for model in models:
            limit = positions(model)
            if limit is None:
                continue
            if not generates(model):
                found = replace(found, prompt=min(found.prompt, limit), prefill=min(found.prefill, limit))
                continue
            prompt = min(found.prompt, limit // 2) if found.prompt + found.new > limit else found.prompt
            new, prefill = min(found.new, limit - prompt), min(found.prefill, limit - 1)
            found = replace(found, prompt=prompt, new=new, prefill=prefill)
        return found


def measure_speed(
    models: Mapping[str, Any],
    workload: Workload | None = None,
    *,
    compiled: Collection[str] = (),
    inputs: Mapping[str, torch.Tensor] | None = None,
    progress: ProgressCallback = quiet,
) -> dict[str, dict[str, Timing]]:
    """Time every model on the same workload, one after the other in each round, so that a busy machine slows all alike.

    Models that generate do so through `generate`: "decode" counts the tokens after the first one, "first token" is the
    time from the call to that one, "prefill" the same for a long prompt. Others run "forward" over the prompt's length
    and, if they read text, "long forward" over that of the long prompt. Prompts are made up.

    Args:
        models: by name, in eval mode, all on the same device; the same model may stand under two names.
        workload: what is run; None for the default one. Longer than the models have positions, it is cut.
        compiled: names whose decode steps (or forward passes) run through `torch.compile`, in one graph, decode steps
            on a static cache.
        inputs: instead of made-up prompts, for models that read something else; long prompts are then left out.
        progress: called with ("measuring speed", rounds of one model done, of all).

    Returns:
        Timings by name and task.

    Raises:
        ArchitectureError: the model does not run on what can be made up, or `generate` does not compile it.
        RecipeError: the workload times nothing.
    """
    workload = (workload or Workload()).fitted(models.values())
    runs = {name: _runner(model, workload, name in compiled, inputs) for name, model in models.items()}
    total, done = len(runs) * (workload.repeats + 1), 0

    def step() -> None:
        nonlocal done
        done += 1
        progress("measuring speed", done, total)

    progress("measuring speed", 0, total)
    for name, run in runs.items():
        with reading_made_up(models[name]) if inputs is None else nullcontext():
            run.warm_up()
        step()
    rounds = timing.in_turn({name: run.once for name, run in runs.items()}, workload.repeats, step)
    return {name: _timings(rounds[name], run.amounts) for name, run in runs.items()}


def compare_decode_speed(
    dense: Any,
    small: Any,
    *,
    prompt: int = 64,
    new: int = 64,
    repeats: int = 3,
    inputs: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, Any]:
    """Both models' speed at batch 1, their runs in turn; see `measure_speed`.

    Returns:
        {"unit", "dense", "compressed", "speedup", "spread"}: medians in "tokens/s" after the first token for models
        that generate, else "passes/s" of one forward pass; speedup is compressed / dense; "spread" has the least and
        the greatest of the runs, {"dense": [least, greatest], "compressed": ...}.
    """
    workload = Workload(prompt, new, prefill=0, repeats=repeats)
    found = measure_speed({"dense": dense, "compressed": small}, workload, inputs=inputs)
    task = "decode" if generates(dense) else "forward"
    rates = {name: timings[task].per_second for name, timings in found.items()}
    speeds = {name: rate.median for name, rate in rates.items()}
    spread = {name: [rate.low, rate.high] for name, rate in rates.items()}
    unit = "tokens/s" if task == "decode" else "passes/s"
    return {"unit": unit, **speeds, "speedup": speeds["compressed"] / speeds["dense"], "spread": spread}


@dataclass(frozen=True)
class _Runner:
    """One model's part of a round: the seconds of each task; the warm-up; and what a task counts, with its unit."""

    once: Callable[[], dict[str, Seconds]]
    warm_up: Callable[[], object]
    amounts: dict[str, tuple[int, str]]


def _runner(model: Any, workload: Workload, compiled: bool, inputs: Mapping[str, torch.Tensor] | None) -> _Runner:
    lengths = [workload.prompt] + [workload.prefill] * (workload.prefill > 0 and inputs is None)
    writes = generates(model)
    made = [
        dict(inputs) if inputs is not None else made_up_inputs(model, n, workload.batch, to_generate=writes)
        for n in lengths
    ]
    if "input_ids" not in made[0]:  # images and sounds have no length to choose
        del made[1:]
    make = _generation if writes else _forward
    return make(model, made, workload, compiled)


def _generation(model: Any, made: list[Inputs], workload: Workload, compiled: bool) -> _Runner:
    def config(new: int) -> Any:
        found = greedy_config(model, new, exactly=True)
        return timing.compiled(found) if compiled else found

    decode, one, few = config(workload.new), config(1), config(WARMUP_TOKENS)

    def once() -> dict[str, Seconds]:
        spent = timing.time_generation(model, made[0], decode)
        found = {"decode": spent.rest, "first token": spent.first}
        if made[1:]:
            found["prefill"] = timing.time_generation(model, made[1], one).first
        return found

    def warm_up() -> None:
        if compiled:  # for the shapes of the very cache that is timed, and once more after that of a long prompt
            for _ in made:
                once()
            if not timing.was_compiled(model):
                raise ArchitectureError(f"{type(model).__name__} has no decode step that generate compiles")
            return
        timing.time_generation(model, made[0], few)
        for long in made[1:]:
            timing.time_generation(model, long, one)

    amounts = {"decode": (workload.batch * (workload.new - 1), "token"), "first token": _read(made[0])}
    if made[1:]:
        amounts["prefill"] = _read(made[1])
    return _Runner(once, warm_up, amounts)


def _forward(model: Any, made: list[Inputs], workload: Workload, compiled: bool) -> _Runner:
    call = torch.compile(model, fullgraph=True) if compiled else model
    tasks = dict(zip(("forward", "long forward"), made, strict=False))

    def once() -> dict[str, Seconds]:
        return {task: timing.time_call(partial(call, **given), model.device) for task, given in tasks.items()}

    return _Runner(once, once, dict.fromkeys(tasks, (workload.batch, "pass")))


def _read(inputs: Inputs) -> tuple[int, str]:
    """What is read before the first token, with its unit."""
    ids = inputs.get("input_ids")
    return (ids.numel(), "token") if ids is not None else (len(next(iter(inputs.values()))), "pass")


def _timings(rounds: list[dict[str, Seconds]], amounts: dict[str, tuple[int, str]]) -> dict[str, Timing]:
    return {
        task: Timing(unit, amount, tuple(r[task].wall for r in rounds), tuple(r[task].cpu for r in rounds))
        for task, (amount, unit) in amounts.items()
    }
