"""`shrink` and `make_plan`: a loaded model, in place."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_shrink.architectures.refused import check_bare, check_type
from hf_shrink.calibration.data import CalibrationData, calibration_batches
from hf_shrink.calibration.inputs import tokenizer_of
from hf_shrink.checkpoint.inference import optimize_for_inference
from hf_shrink.checkpoint.loaded_dtypes import loaded_dtypes
from hf_shrink.checkpoint.record import ShrinkRecord, source_of
from hf_shrink.checkpoint.save import bind as bind_save
from hf_shrink.checkpoint.save import report_portability
from hf_shrink.checkpoint.source import check_finite
from hf_shrink.checkpoint.ties import settle_ties
from hf_shrink.errors import CalibrationError, RecipeError
from hf_shrink.evaluation.machine import hardware
from hf_shrink.evaluation.scored import device_of
from hf_shrink.evaluation.size import unique_bytes
from hf_shrink.modes import modes_kept
from hf_shrink.pipeline.applying import apply_plan
from hf_shrink.pipeline.keeping import NOTHING_KEPT, Keeper
from hf_shrink.pipeline.made_for import as_carried_out, check_made_for
from hf_shrink.pipeline.planning import Planned, find_binding, plan_recipe
from hf_shrink.pipeline.recipes import (
    DEFAULT_RECIPE,
    RecipeLike,
    calibration_of,
    load_recipe,
    needs_calibration,
    plan_method,
    plan_transforms,
    plan_weights_method,
)
from hf_shrink.pipeline.searching import Searching
from hf_shrink.pipeline.vocabulary import apply_vocabulary
from hf_shrink.pipeline.whole_tuning import teacher_of, tune_whole
from hf_shrink.plan import Plan
from hf_shrink.recipe import Recipe
from hf_shrink.report import ShrinkReport
from hf_shrink.reporting.layout import layout_of
from hf_shrink.reporting.progress import Progress, silence
from hf_shrink.residence import at_home, cast, residence_of
from hf_shrink.runtime.attention import grouped_attention
from hf_shrink.runtime.packed import PackedModule, count_parameters
from hf_shrink.sharding import ranks, together
from hf_shrink.tuning import Tuning

Module = TypeVar("Module", bound=nn.Module)
NO_DATA = CalibrationData(batches=[], description="no calibration data")


def shrink(
    model: Module,
    recipe: RecipeLike | Plan = DEFAULT_RECIPE,
    *,
    tokenizer: Any = None,
    calibration: Any = None,
    seed: int = 0,
    progress: bool = True,
    optimize: bool = True,
) -> Module:
    """Make a model smaller, in place; returns the same object.

    Afterwards `generate`, `save_pretrained` and `push_to_hub` just work and `model.shrink_report` says what came of
    it. Nothing is changed before the whole plan is made; a failure while it is carried out leaves the model half done.

    In processes that accelerate or torchrun started, all of them call this on the same model; they share the work, and
    end with the same bits. A model that accelerate dispatched (`device_map`) is shrunk where its weights are.

    Args:
        model: a transformers model, dense; any `torch.nn.Module` for data-free steps (`quantize` with `method: rtn`,
            `prune` with `what: weights` and `method: magnitude`).
        recipe: a built-in name ("w4a16", "prune20-w4a16", ...; see `hf-shrink recipes`), the path of a YAML file, a
            mapping, a `Recipe`, or a `Plan` made for this model.
        tokenizer: tokenizer or processor; needed when calibration data is text, images or sound, and rewritten in place
            where the recipe prunes the vocabulary.
        calibration: in place of the recipe's `calibration.data`: a name such as "self" or "wikitext", the path of a
            .txt, .jsonl or .parquet file, a `datasets.Dataset`, or an iterable of texts or of model-input dicts.
        seed: of everything random. Same seed, same machine, same bytes.
        progress: show progress bars.
        optimize: let packed weights multiply with fast kernels in the end; see `optimize_for_inference`.

    Raises:
        RecipeError: the recipe is not valid, or cannot be met on this model.
        ArchitectureError: the model's structure does not allow a step.
        CalibrationError: the data is missing or too short, or numbers are not finite.
    """
    with at_home(model, changes=True) as offloads:
        with together(), silence(), evaluating(model):
            job = Job(model, recipe, tokenizer, calibration, seed, Progress(quiet=not progress))
            record = job.run(job.data())
        if isinstance(model, PreTrainedModel):
            bind_save(model, record)
        else:
            model.shrink_record, model.shrink_report = record, record.report  # type: ignore[assignment]
        # What comes and goes keeps the layout of the files.
        return optimize_for_inference(model) if optimize and not offloads else model


def make_plan(
    model: nn.Module,
    recipe: RecipeLike = DEFAULT_RECIPE,
    *,
    tokenizer: Any = None,
    calibration: Any = None,
    seed: int = 0,
    progress: bool = True,
) -> Plan:
    """What `shrink` would do, without doing it. Arguments and errors as in `shrink`."""
    return planned(model, recipe, tokenizer=tokenizer, calibration=calibration, seed=seed, progress=progress).plan


def planned(
    model: nn.Module, recipe: RecipeLike, *, tokenizer: Any, calibration: Any, seed: int, progress: bool
) -> Planned:
    """As `make_plan`, with what the user should know about how the plan came to be."""
    with at_home(model), together(), silence(), evaluating(model):
        job = Job(model, recipe, tokenizer, calibration, seed, Progress(quiet=not progress))
        return job.plan(job.data())


def check_not_quantized(model: nn.Module) -> None:
    """Raises RecipeError for a model that is quantized already."""
    block = getattr(getattr(model, "config", None), "quantization_config", None)
    if block is None and any(isinstance(m, PackedModule) for m in model.modules()):
        block = {"quant_method": "hf_shrink"}
    if block is not None:
        method = block.get("quant_method") if isinstance(block, dict) else getattr(block, "quant_method", None)
        raise RecipeError(f"this model is quantized already ({getattr(method, 'value', method)}); load the dense model")


@contextmanager
def evaluating(model: nn.Module) -> Any:
    """The model in eval mode and without gradients, with the faster attention; each module's own mode afterwards, and
    the model's in modules that came meanwhile."""
    with modes_kept(model), torch.no_grad(), grouped_attention(model):
        model.eval()
        yield


@dataclass
class Job:
    """One run on one model: what is asked for, checked before anything is computed."""

    model: nn.Module
    asked: RecipeLike | Plan
    tokenizer: Any
    calibration: Any
    seed: int
    show: Progress
    exclude: Sequence[str] | None = None
    keeper: Keeper = NOTHING_KEPT

    def __post_init__(self) -> None:
        check_bare(self.model)
        asked = self.asked if isinstance(self.asked, Plan) else load_recipe(self.asked)
        self.spec = calibration_of(asked)
        if isinstance(self.calibration, str | os.PathLike):
            self.spec, self.calibration = replace(self.spec, data=os.fspath(self.calibration)), None
        self.recipe = replace(asked, calibration=self.spec) if isinstance(asked, Recipe) else None
        if isinstance(self.asked, Plan):
            self.asked = replace(self.asked, calibration=asdict(self.spec))
            plan_method(self.asked)
            plan_transforms(self.asked)
            plan_weights_method(self.asked)
            Tuning.from_options(self.asked.tune)
        check_not_quantized(self.model)
        if residence_of(self.model) is None:  # else that was done when it was opened
            check_finite(self.model)
        check_type(self.model)
        if isinstance(self.asked, Plan):
            check_made_for(self.model, self.asked)
        if self.recipe is not None and self.recipe.budget is not None:
            # Before there is any data, which can take minutes to make.
            with (
                silence(),
                evaluating(self.model),
                Searching.on(self.model, self.recipe, (), self.seed, self.show) as search,
            ):
                search.check(self.recipe.budget)

    def data(self) -> CalibrationData:
        """Calibration batches; none when no step needs them."""
        if self.recipe is not None:
            needed = needs_calibration(self.recipe)
        else:
            assert isinstance(self.asked, Plan)
            solvers = plan_method(self.asked), plan_weights_method(self.asked), *plan_transforms(self.asked)
            needed = any(s is not None and s.needs_statistics for s in solvers) or bool(self.asked.tune)
            needed = needed or self.asked.hidden is not None
            needed = needed or (self.asked.prunes and (self.asked.refit or self.asked.repair))
        if not needed:
            return NO_DATA
        if not isinstance(self.model, PreTrainedModel):
            raise CalibrationError(
                "only transformers models can be calibrated; for this module use method: rtn to quantize, magnitude to "
                "prune weights"
            )
        make = functools.partial(
            calibration_batches,
            self.spec,
            source=self.calibration,
            model=self.model,
            tokenizer=self.tokenizer,
            seed=self.seed,
            exclude=self.exclude,
            progress=self.show,
        )
        return self.keeper.data("calibration", lambda: ranks().on_first(make), named=self.calibration is None)

    def plan(self, data: CalibrationData) -> Planned:
        if isinstance(self.asked, Plan):
            return as_carried_out(self.model, self.asked)
        assert self.recipe is not None
        return ranks().from_first(
            plan_recipe(self.model, self.recipe, data.batches, self.seed, self.show, self.tokenizer)
        )

    def _with_fewer_tokens(
        self, plan: Plan, data: CalibrationData
    ) -> tuple[CalibrationData, PreTrainedTokenizerBase | None]:
        """The data in the tokens that a vocabulary plan leaves, and the tokenizer that it rewrote, if it did."""
        if plan.vocabulary is None:
            return data, None
        if not isinstance(self.model, PreTrainedModel):
            raise RecipeError("only transformers models have a vocabulary; this module can be quantized")
        batches = apply_vocabulary(self.model, plan.vocabulary, self.tokenizer, data.batches)
        return replace(data, batches=batches), tokenizer_of(self.tokenizer)

    def run(self, data: CalibrationData) -> ShrinkRecord:
        """Plan and apply; returns the record of it."""
        started = time.perf_counter() - self.keeper.elapsed
        model = self.model
        report = ShrinkReport(parameters_before=count_parameters(model), bytes_before=unique_bytes(model))
        report.notes += data.notes
        report.seed = self.seed
        if data.batches:
            report.calibration = {"description": data.description, **data.details}
            report.calibration |= {} if self.calibration is None else {"object": True}
        planned = self.keeper.planned(lambda: self.plan(data))
        report.seconds["plan"] = time.perf_counter() - started
        report.notes += planned.notes
        self.keeper.begin(model, planned.plan, data.batches)
        data, tokenizer = self._with_fewer_tokens(planned.plan, data)
        if planned.plan.dtype != "keep":
            dtype = getattr(torch, planned.plan.dtype)
            cast(model, dtype, loaded_dtypes(model, dtype))
        tuning = Tuning.from_options(planned.plan.tune)
        teacher = None
        if tuning is not None:
            teacher = teacher_of(model, tuning, data, self.tokenizer, self.seed, self.show, report.notes)
        method = plan_method(planned.plan)
        binding = find_binding(model)
        report.layout = [] if binding is None else [block.to_dict() for block in layout_of(binding)]
        report.machine = {**hardware(), "threads": torch.get_num_threads(), "device": str(device_of(model))}
        apply_plan(model, binding, planned.plan, method, data.batches, report, self.show, self.seed, keeper=self.keeper)
        if tuning is not None:
            since = time.perf_counter()
            report.notes += tune_whole(model, tuning, teacher, self.seed, self.show)
            report.seconds["tune"] = time.perf_counter() - since
        if isinstance(model, PreTrainedModel):
            settle_ties(model)
            report_portability(model, report)
        report.parameters_after, report.bytes_after = count_parameters(model), unique_bytes(model)
        report.seconds["total"] = time.perf_counter() - started
        self.show.close()
        report = ranks().from_first(report)  # seconds are not the same everywhere
        recipe = self.recipe.to_dict() if self.recipe is not None else {}
        if recipe and "object" in report.calibration:  # an object: the recipe can only say what it was
            recipe["calibration"]["data"] = data.description
        return ShrinkRecord(source_of(model), recipe, planned.plan, report, tokenizer=tokenizer)
