"""One model type after the other: what of hf_shrink works on a tiny model of it. A worker of coverage.py.

Reads JSON lines {"type", "class", "folder"} and answers each with one JSON line. Checkpoints stay in the folder, for
the worker that loads them in stock transformers.
"""

from __future__ import annotations

import copy
import json
import shutil
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import transformers
from coverage_types import tiny_model
from torch import Tensor
from transformers import PreTrainedModel

import hf_shrink
from hf_shrink.architectures.binding import bind
from hf_shrink.architectures.linears import matrix
from hf_shrink.architectures.probe import Inputs, ProbeError, difference, find_inputs, outputs
from hf_shrink.architectures.verify import skipped
from hf_shrink.errors import RecipeError, ShrinkError
from hf_shrink.plan import BlockPlan, Plan

NEAR = 1e-4
WIDTH = [{"what": "width", "method": "magnitude", "ratio": ratio, "refit": False} for ratio in (0.15, 0.05, 0.01)]
DEPTH = {"what": "depth", "method": "block_influence", "blocks": 1, "refit": False}
QUANTIZE = {"method": "rtn", "scheme": "W4A16", "group_size": 32}


def check(name: str, class_name: str, folder: Path) -> dict[str, Any]:
    """What works on this type: a step is "ok" or says why not, and begins with WRONG where outputs are not right."""
    result: dict[str, Any] = {"class": class_name}
    try:
        model = tiny_model(name, class_name)
        inputs = find_inputs(model)
    except Exception as error:  # a type that cannot be built from a small config is a row of the table
        return {**result, "built": _said(error)}
    off = _round_trip(model, inputs, folder / "dense")
    if off != "ok":
        return {**result, "built": off}
    result |= {"built": "ok", "parameters": sum(p.numel() for p in model.parameters())}
    try:
        binding = bind(copy.deepcopy(model))
    except ShrinkError as error:
        return {**result, "bound": "no blocks", "missing": [str(error)]}
    result |= {"bound": binding.source or "quantize only", "missing": list(binding.missing)}
    torch.save(inputs, folder / "inputs.pt")
    steps: dict[str, Callable[[], dict[str, Any]]] = {
        "width": lambda: _narrowed(model, inputs, folder / "width", portable=False),
        "width_portable": lambda: _narrowed(model, inputs, folder / "width_portable", portable=True),
        "depth": lambda: _pruned(model, inputs, DEPTH, folder / "depth", portable=False),
        "quantized": lambda: _quantized(model, inputs, folder / "quantized"),
    }
    for step, run in steps.items():
        try:
            result[step] = run()
        except (ShrinkError, ProbeError) as error:
            result[step] = {"status": f"refused: {error}"}
        except Exception as error:  # what should have been refused earlier, and with a reason
            result[step] = {"status": f"FAILED: {_said(error)}"}
    return result


def _round_trip(model: PreTrainedModel, inputs: Inputs, folder: Path) -> str:
    """Whether transformers itself gives the dense model back after saving it."""
    try:
        type(model).save_pretrained(model, folder)
        off = difference(outputs(type(model).from_pretrained(folder).eval(), inputs), outputs(model, inputs))
    except Exception as error:
        return f"the dense model cannot be saved and loaded: {_said(error)}"
    return "ok" if off <= NEAR else f"the dense model gives other outputs after saving and loading (by {off:.1e})"


def _narrowed(model: PreTrainedModel, inputs: Inputs, folder: Path, *, portable: bool) -> dict[str, Any]:
    """Prune units: fewer where most parameters are in parts that have none."""
    for step in WIDTH[:-1]:
        try:
            return _pruned(model, inputs, step, folder, portable=portable)
        except RecipeError:
            continue
    return _pruned(model, inputs, WIDTH[-1], folder, portable=portable)


def _pruned(
    model: PreTrainedModel, inputs: Inputs, step: dict[str, Any], folder: Path, *, portable: bool
) -> dict[str, Any]:
    """Prune a copy, compare it with the masked model, save it and load it again."""
    smaller = copy.deepcopy(model)
    recipe = {"portable": portable, "steps": [{"prune": step}]}
    hf_shrink.shrink(smaller, recipe, calibration=[dict(inputs)] if step is DEPTH else None, progress=False)
    plan = smaller.shrink_record.plan
    expected = masked_outputs(copy.deepcopy(model), inputs, plan)
    found = outputs(smaller, inputs)
    off, seen = difference(found, expected), difference(expected, outputs(model, inputs))
    if off > NEAR:
        return {"status": f"WRONG: off by {off:.1e} from the masked model"}
    if seen < 10 * NEAR:
        return {"status": "FAILED: what was removed could not be seen"}
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, smaller))
    cached = _cache(model, smaller, inputs) if step is DEPTH else "not tried"
    status = "ok" if cached in ("ok", "not tried") else cached
    return {"status": status, "removed": round(1 - after / before, 4)} | _kept(smaller, inputs, folder)


def _quantized(model: PreTrainedModel, inputs: Inputs, folder: Path) -> dict[str, Any]:
    smaller = copy.deepcopy(model)
    # Fast kernels round inputs, which sends tokens of a mixture to other experts: what is stored is looked at here.
    recipe = {"portable": False, "steps": [{"quantize": QUANTIZE}]}
    hf_shrink.shrink(smaller, recipe, progress=False, optimize=False)
    seen = difference(outputs(smaller, inputs), outputs(model, inputs))
    if seen == 0:
        return {"status": "FAILED: the outputs are those of the dense model"}
    weights = len(smaller.shrink_record.plan.schemes)
    stored = {"quantization_config": hf_shrink.LoadingConfig(optimize=False)}
    return {"status": "ok", "weights": weights} | _kept(smaller, inputs, folder, **stored)


def _kept(model: PreTrainedModel, inputs: Inputs, folder: Path, **loading: Any) -> dict[str, Any]:
    """Save and load again, in a process with hf_shrink."""
    expected = outputs(model, inputs)
    found: dict[str, Any] = {"portable": bool(model.shrink_report.portable)}
    found["not_portable_because"] = list(model.shrink_report.not_portable_because)
    try:
        model.save_pretrained(folder)
        found["saved"] = "ok"
    except Exception as error:
        return {**found, "saved": _said(error)}
    torch.save(expected, folder / "expected.pt")
    try:
        again = type(model).from_pretrained(folder, **loading).eval()
        off = difference(outputs(again, inputs), expected)
        found["loaded"] = "ok" if off <= NEAR else f"WRONG: off by {off:.1e} after loading"
    except Exception as error:
        found["loaded"] = _said(error)
    return found


def masked_outputs(model: PreTrainedModel, inputs: Inputs, plan: Plan) -> list[Tensor]:
    """The dense model's outputs with zero columns for the units that a plan removes, and its blocks skipped."""
    binding, skips = bind(model), []
    for name, wanted in plan.stacks.items():
        bound = binding.stack(name)
        for block in bound.blocks:
            kept = wanted.blocks.get(block.index, BlockPlan())
            for part, role, units in (
                (block.attention, "output", kept.query_heads),
                (block.cross_attention, "output", kept.cross_heads),
                (block.mlp, "down", kept.channels),
            ):
                if part is not None and units is not None:
                    slot = part.slot(role)
                    gone = [u for u in range(len(slot.index)) if u not in set(units)]
                    matrix(part.modules[slot.path])[:, slot.positions(gone)] = 0
            if block.experts is not None and kept.expert_channels is not None:
                down = block.experts.module.get_parameter(block.experts.spec.down_fused)
                for expert, channels in enumerate(kept.expert_channels):
                    down.data[expert][:, sorted(set(range(block.experts.channels)) - set(channels))] = 0
        skips.append(skipped(bound, [b.index for b in bound.blocks if b.index not in wanted.kept]))
    with ExitStack() as stack:
        for skip in skips:
            stack.enter_context(skip)
        return outputs(model, inputs)


def _cache(dense: PreTrainedModel, smaller: PreTrainedModel, inputs: Inputs) -> str:
    """Whether decoding with a KV cache gives what the full forward gives, where it does on the dense model."""
    if "input_ids" not in inputs or not dense.can_generate() or dense.config.is_encoder_decoder:
        return "not tried"
    try:
        if _decoding_error(dense, inputs) > NEAR:
            return "not tried"
    except Exception:  # a model that has no such cache
        return "not tried"
    off = _decoding_error(smaller, inputs)
    return "ok" if off <= NEAR else f"WRONG: off by {off:.1e} with a KV cache"


def _decoding_error(model: PreTrainedModel, inputs: Inputs) -> float:
    ids = inputs["input_ids"]
    with torch.no_grad():
        full = model(input_ids=ids, use_cache=False).logits
        first = model(input_ids=ids[:, :8], use_cache=True)
        second = model(input_ids=ids[:, 8:9], past_key_values=first.past_key_values, use_cache=True)
    return difference([second.logits], [full[:, 8:9]])


def _said(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:240]}" if lines else type(error).__name__


def main() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    answers = sys.stdout
    sys.stdout = sys.stderr  # what libraries print is no answer
    for line in sys.stdin:
        job = json.loads(line)
        folder = Path(job["folder"])
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        print(json.dumps(check(job["type"], job["class"], folder)), file=answers, flush=True)


if __name__ == "__main__":
    main()
