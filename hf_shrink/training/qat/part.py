"""A quantize step while a model is trained: weights are rounded in the forward pass, and packed in the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_shrink.architectures.adapters import without_adapters
from hf_shrink.architectures.bound import Cuts
from hf_shrink.calibration.data import calibration_batches
from hf_shrink.checkpoint.packed import packed_schemes
from hf_shrink.checkpoint.record import ShrinkRecord
from hf_shrink.errors import CalibrationError, ShrinkError
from hf_shrink.plan import Plan
from hf_shrink.recipe import Recipe
from hf_shrink.training.models import is_sharded, whole
from hf_shrink.training.qat.adapters import adapted_layers, attach_adapted, detach_adapted, weight_now
from hf_shrink.training.qat.forward import detach_all, owned_quantizers
from hf_shrink.training.qat.placing import pack_trained, place_quantizers
from hf_shrink.training.qat.plan import plan_training
from hf_shrink.training.qat.quantizer import Start, WeightQuantizer
from hf_shrink.training.qat.sharded import add_whole, check_shapes
from hf_shrink.training.qat.size import effective_bits
from hf_shrink.training.qat.start import solving_method, start_of, start_on_data, without_data
from hf_shrink.training.schedule import Window

MOVED = "moved_weight"  # beside the names of a quantizer's own tensors


class QuantizationTraining:
    """A `Part`: `quantize`, with learned step sizes (LSQ, Esser et al., arXiv 1902.08153).

    Rounding begins where the schedule starts; after a prune step where it ends, when it is settled what is left.
    """

    adds_parameters: ClassVar[bool] = True

    def __init__(
        self,
        recipe: Recipe,
        cuts: Callable[[], Cuts] | None = None,
        *,
        calibration: Any = None,
        tokenizer: Any = None,
        seed: int = 0,
    ) -> None:
        """
        Args:
            recipe: with a quantize step.
            cuts: what another part is going to keep of matrices, settled when the schedule ends; None: there is none.
            calibration: data, as for `shrink`, for the start of a method that wants statistics. None: the scales start
                where they fit the weights best.
            tokenizer: for calibration texts.
        """
        self._recipe, self._calibration, self._tokenizer, self._seed = recipe, calibration, tokenizer, seed
        self._cuts: Callable[[], Cuts] = cuts or dict
        self._after_pruning = len(recipe.steps) > 1

    def attach(self, model: PreTrainedModel) -> None:
        self._model = model
        detach_adapted(model)
        self._layers: Mapping[int, nn.Module] = adapted_layers(model)
        with without_adapters(model):
            detach_all(model)
            planned = plan_training(model, self._recipe)
            schemes, self._notes = planned.plan.schemes, planned.notes
            self._losing = frozenset(path for path, axis in self._cuts() if axis == "in")
            self._batches = self._calibration_batches(model, planned.plan)
            self._plan = planned.plan if self._batches else without_data(planned.plan)
            self._dense_bits, self._packed_bits = effective_bits(model, {}), effective_bits(model, schemes)
            self._quantizers: Mapping[str, WeightQuantizer] = place_quantizers(model, schemes, self._losing)
            self._modules = {path: model.get_submodule(path) for path in schemes}
        for path, module in self._modules.items():
            if id(module) in self._layers:
                attach_adapted(self._layers[id(module)], path)

    def attach_copy(self, model: PreTrainedModel) -> None:
        self._keep_inputs(place_quantizers(model, self._plan.schemes, self._losing))

    def begin(self, model: PreTrainedModel, window: Window) -> None:
        self._start = self.settled(window)
        self._moved: set[str] = set()  # whose weights the start changed, which a checkpoint of adapters does not have
        for quantizer in self._quantizers.values():
            quantizer.reset()
        check_shapes(model, self._modules.values())
        if self._batches and is_sharded(model):
            raise CalibrationError(
                "FSDP has spread the weights, so no copy can be calibrated; leave calibration out: scales then start "
                "where they fit the weights best"
            )

    def settled(self, window: Window) -> int:
        return window.end if self._after_pruning else window.start

    def before_optimizer_step(self, step: int, scale: float) -> None:
        for quantizer in self._quantizers.values():
            if not quantizer.active:
                quantizer.step.grad = None  # a zero, with which an optimizer's averages would begin

    def after_step(self, step: int) -> None:
        if step == 0:
            for quantizer in self._quantizers.values():
                quantizer.forget()
        if step == self._start:
            self._begin_rounding()

    def finish(self, model: PreTrainedModel, record: ShrinkRecord) -> None:
        """Raises ShrinkError where rounding has not begun, so that there are no scales to pack with."""
        waiting = [path for path, quantizer in self._quantizers.items() if not quantizer.active]
        if waiting:
            raise ShrinkError(
                f"{waiting[0]} was not trained for few bits: rounding was to begin at step {self._start} and did not; "
                "start the training anew in another output_dir"
            )
        plan, cuts = self._plan, self._cuts()
        for path, quantizer in owned_quantizers(model, plan.schemes).items():
            quantizer.cut(cuts.get((path, "out")))
        pack_trained(model, plan.schemes, sparse=self._recipe.prune("weights") is not None)
        schemes = packed_schemes(model)
        record.plan = replace(
            record.plan, schemes=schemes, method=plan.method, options=plan.options, effort=plan.effort
        )
        found = f"by {plan.method} {'on calibration data' if self._batches else 'without data'}"
        note = f"weights were rounded from step {self._start} on, with learned scales that were first found {found}"
        record.report.notes += [*self._notes, note]

    def tensors(self) -> dict[str, Tensor]:
        if not self._layers:
            return {}  # a checkpoint of the model has them
        states = {path: quantizer.state_dict() for path, quantizer in self._quantizers.items()}
        found = {f"{path}.{name}": tensor for path, state in states.items() for name, tensor in state.items()}
        return found | {f"{path}.{MOVED}": _weight(self._modules[path]) for path in self._moved}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for path, quantizer in self._quantizers.items():
            if self._layers:
                quantizer.load_state_dict({name: tensors[f"{path}.{name}"] for name in quantizer.state_dict()})
            if f"{path}.{MOVED}" in tensors:
                self._moved.add(path)
                _weight(self._modules[path]).copy_(tensors[f"{path}.{MOVED}"])
            quantizer.active = quantizer.begun
        if all(quantizer.active for quantizer in self._quantizers.values()):
            self._keep_inputs(self._quantizers)

    def figures(self) -> dict[str, float]:
        active = all(quantizer.active for quantizer in self._quantizers.values())
        return {"effective_bits": self._packed_bits if active else self._dense_bits}

    def _calibration_batches(self, model: PreTrainedModel, plan: Plan) -> Sequence[Mapping[str, Any]]:
        if self._calibration is None or not solving_method(plan).needs_statistics:
            return []
        if self._after_pruning:
            raise CalibrationError(
                "what would be calibrated does not know what the prune step takes; leave calibration out, or train "
                "with the prune step first, and then the pruned model with the quantize step"
            )
        return calibration_batches(
            self._recipe.calibration,
            source=self._calibration,
            model=model,
            tokenizer=self._tokenizer,
            seed=self._seed,
        ).batches

    def _begin_rounding(self) -> None:
        self._keep_inputs(self._quantizers)
        on_data = start_on_data(self._model, self._plan, self._batches, self._seed) if self._batches else {}
        for path, quantizer in self._quantizers.items():
            module = self._modules[path]
            weight = quantizer.left(whole(weight_now(module, self._layers.get(id(module)))))
            start = Start.of(weight, on_data.get(path) or start_of(self._plan, quantizer.scheme, weight))
            quantizer.begin(start)
            if start.correction is not None:
                add_whole(module, start.correction)
                self._moved.add(path)

    def _keep_inputs(self, quantizers: Mapping[str, WeightQuantizer]) -> None:
        """Let matrices make groups of the inputs that they will have left."""
        cuts = self._cuts()
        for path in self._losing & quantizers.keys():
            quantizers[path].keep(cuts[path, "in"])


def _weight(module: nn.Module) -> Tensor:
    assert isinstance(module.weight, nn.Parameter)
    return module.weight.detach()
