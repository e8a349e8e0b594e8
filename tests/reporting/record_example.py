"""A record as a run would leave it, with as much or as little measured as a test wants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf_shrink.plan import BlockPlan, Plan, Scheme, StackPlan
from hf_shrink.recipe import Recipe
from hf_shrink.report import ShrinkReport

ROLES = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")


@dataclass
class ExampleRecord:
    source: str
    recipe: dict[str, Any]
    plan: Plan
    report: ShrinkReport


def figure(value: float) -> dict[str, float]:
    return {"value": value, "low": value * 0.9, "high": value * 1.1}


def full_record(source: str = "owner/tiny-llama") -> ExampleRecord:
    schemes = {
        f"model.layers.{block}.{role}": Scheme(bits=(3, 4, 8)[(block + i) % 3], group_size=16)
        for block in range(4)
        for i, role in enumerate(ROLES)
        if (block, role) != (2, "mlp.down_proj")
    }
    schemes["lm_head"] = Scheme(bits=8, group_size=16)
    stack = StackPlan(kept=(0, 1, 2, 3), blocks={0: BlockPlan(channels=tuple(range(60)))})
    report = ShrinkReport(
        parameters_before=120_000,
        parameters_after=100_000,
        bytes_before=480_000,
        bytes_after=120_000,
        seconds={"calibrate": 1.5, "total": 4.25},
        notes=["group size 128 does not divide 48; 16 is used", "<b>note & more</b>"],
        block_errors={f"model.layers.{i}": 0.01 * (i + 1) for i in range(4)},
        evaluation={
            "data": "16 x 512 tokens of shore.txt",
            "task": "text-generation",
            "tokens": 8176,
            "sequences": 16,
            "context": 512,
            "dense": {"perplexity": figure(12.0)},
            "compressed": {
                "perplexity": figure(13.0),
                "kl_divergence": figure(0.08),
                "top1_agreement": figure(0.9),
            },
            "excess_loss": figure(0.08),
            "skipped": {},
            "speed": {"unit": "tokens/s", "dense": 20.0, "compressed": 30.0, "speedup": 1.5},
        },
        completions={"prompt": "The <tide>", "dense": "goes out", "compressed": "```goes``` & comes"},
    )
    recipe = Recipe.from_dict({"name": "w4a16", "steps": [{"quantize": {"method": "gptq"}}]}).to_dict()
    return ExampleRecord(source, recipe, Plan("llama", {"decoder": stack}, schemes, method="gptq"), report)


def bare_record() -> ExampleRecord:
    """Nothing measured, nothing quantized."""
    recipe = {"steps": [{"prune": {"what": "depth", "method": "kl_greedy", "blocks": 1}}]}
    plan = Plan("llama", {"decoder": StackPlan(kept=(0, 2))})
    report = ShrinkReport(portable=False, not_portable_because=["blocks of <unequal> width"])
    return ExampleRecord("/somewhere/private/dense-model", recipe, plan, report)
