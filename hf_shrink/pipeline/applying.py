"""The one pass that carries out a Plan: block by block, everything planned for a block before the next is touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_shrink.architectures.binding import Binding
from hf_shrink.architectures.linears import is_matrix
from hf_shrink.calibration.statistics import InputStatistics
from hf_shrink.errors import RecipeError
from hf_shrink.pipeline.keeping import NOTHING_KEPT, Keeper
from hf_shrink.pipeline.kept import present, whole_stack
from hf_shrink.pipeline.learning import Learning
from hf_shrink.pipeline.masking import Masking
from hf_shrink.pipeline.packing import tied_partner_missing, untie
from hf_shrink.pipeline.recipes import plan_transforms, plan_weights_method
from hf_shrink.pipeline.repairing import repair_and_remove
from hf_shrink.pipeline.running import Run
from hf_shrink.pipeline.shifting import shift
from hf_shrink.pipeline.slicing import slice_planned
from hf_shrink.pipeline.towers import tower_batches, towers_with
from hf_shrink.pipeline.transforming import BlockScaler, rotate
from hf_shrink.plan import Plan
from hf_shrink.progress import ProgressCallback
from hf_shrink.quantization.base import LearningMethod, Method, ModelMethod
from hf_shrink.report import ShrinkReport
from hf_shrink.runtime.experts import packs_experts, separate_experts, separate_modules
from hf_shrink.surgery import is_uneven, settle_config, settle_generation


def apply_plan(
    model: nn.Module,
    binding: Binding | None,
    plan: Plan,
    method: Method | None,
    batches: Sequence[Mapping[str, Any]],
    report: ShrinkReport,
    progress: ProgressCallback,
    seed: int = 0,
    keeper: Keeper = NOTHING_KEPT,
) -> None:
    """Carry out `plan` on `model` in place, and fill `report`.

    Args:
        binding: the model's, before anything is changed; None for a plain module, whose weights are only packed.
        method: stores the plan's weights; None when it has none.
        batches: model inputs for calibration; may be empty when nothing needs them.
        keeper: writes down what is finished, and knows what already is.
    """
    touched = [*plan.schemes, *(plan.weights.modules if plan.weights is not None else ())]
    towers = towers_with(binding, touched)
    zeroing = plan_weights_method(plan)
    solves = any(m is not None and m.needs_statistics for m in (method, zeroing))
    reaching = tower_batches(model, towers, batches) if solves else {}
    stacks = repair_and_remove(model, binding, plan, batches, report, progress) if binding is not None else []
    apart = packs_experts(binding, touched) or any(stack.plan.cuts_experts for stack in stacks)
    put_back = separate_experts(model) if apart else None
    if plan.hidden is not None:
        stacks = slice_planned(model, stacks, plan.hidden, batches, report, progress)
    schemes, formats = present(plan.schemes, stacks), present(plan.formats, stacks)
    whole, method = (method, None) if isinstance(method, ModelMethod) else (None, method)
    untie(model, tied_partner_missing(model, schemes))
    transforms = plan_transforms(plan)
    report.notes += rotate(model, [s.stack for s in stacks], transforms)
    report.notes += shift(model, [s.stack for s in stacks], transforms, schemes, batches)
    masking = Masking.begin(model, plan.weights, zeroing, stacks)
    blocks = [block.path for stack in (*towers, *(s.stack for s in stacks)) for block in stack.blocks]
    work = tuple(dict.fromkeys([*schemes, *(masking.modules if masking is not None else ())]))
    inside = {path for path in work if any(path.startswith(block + ".") for block in blocks)}
    outer = [path for path in work if path not in inside]
    scaler = BlockScaler(model, transforms, schemes, weighted=solves)
    run = Run(model, plan, schemes, work, method, masking, scaler, batches, report, progress, len(blocks), keeper)
    if isinstance(method, LearningMethod):
        run.learning = Learning(model, method, seed)
    for tower in towers:
        run.stack(whole_stack(tower), (), reaching.get(tower.path))
    if binding is not None and binding.towers:
        done = run.between(stacks[0].stack, outer)
        outer = [path for path in outer if path not in done]
    statistics: dict[str, InputStatistics] = {}
    for position, stack in enumerate(stacks):
        heads = [p for p in outer if is_matrix(model.get_submodule(p))] if position == len(stacks) - 1 else []
        statistics = run.stack(stack, heads)
    report.notes += scaler.notes()
    run.pack({path: statistics.get(path) for path in outer})
    if put_back is not None and not packs_experts(binding, plan.schemes):
        put_back()
    for experts in separate_modules(model).values():
        experts.own_weights()
    report.notes += masking.report() if masking is not None else []
    if run.learning is not None:
        report.notes.append(run.learning.note())
    if isinstance(model, PreTrainedModel) and binding is not None:
        settle_config(model)
        report.notes += settle_generation(model, plan)
    if formats and whole is not None:
        if is_uneven(model):
            raise RecipeError(
                f"the plan leaves blocks of different shapes, which stock transformers cannot load with {plan.method}; "
                "plan with portable: true, or quantize with gptq"
            )
        with run.timed("solve"):
            whole.convert(model, formats)
