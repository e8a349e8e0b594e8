"""A record as a run would leave it, with as much or as little measured as a test wants."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from hf_shrink.front import Front, Point
from hf_shrink.plan import BlockPlan, Plan, Scheme, StackPlan
from hf_shrink.recipe import Recipe
from hf_shrink.report import ShrinkReport
from hf_shrink.reporting.layout import BlockLayout

ROLES = {"query": "self_attn.q_proj", "key + value": "self_attn.kv_proj", "output": "self_attn.o_proj"}
MLP_ROLES = {"up": "mlp.up_proj", "down": "mlp.down_proj"}


@dataclass
class ExampleRecord:
    source: str
    recipe: dict[str, Any]
    plan: Plan
    report: ShrinkReport
    versions: dict[str, str] = field(default_factory=dict)


def figure(value: float) -> dict[str, float]:
    return {"value": value, "low": value * 0.9, "high": value * 1.1}


def layout(blocks: int) -> list[dict[str, Any]]:
    parts = {
        "attention": {role: (path,) for role, path in ROLES.items()},
        "mlp": {role: (path,) for role, path in MLP_ROLES.items()},
    }
    sizes = {"heads": 6, "groups": 3, "channels": 1536}
    return [BlockLayout("decoder", i, f"model.layers.{i}", parts, sizes).to_dict() for i in range(blocks)]


def full_record(source: str = "owner/tiny-llama", blocks: int = 4) -> ExampleRecord:
    """The last block is dropped, the first one narrower, the second without its MLP; the rest in 3, 4 or 8 bits."""
    paths = [*ROLES.values(), *MLP_ROLES.values()]
    schemes = {
        f"model.layers.{block}.{path}": Scheme(bits=(3, 4, 8)[(block + i) % 3], group_size=16)
        for block in range(blocks - 1)
        for i, path in enumerate(paths)
        if (block, path) != (2, "mlp.down_proj") and not (block == 1 and "mlp" in path)
    }
    schemes["lm_head"] = Scheme(bits=8, group_size=16)
    own = {0: BlockPlan(query_heads=(0, 1, 2, 3), channels=tuple(range(1024))), 1: BlockPlan(removed=("mlp",))}
    plan = Plan("llama", {"decoder": StackPlan(tuple(range(blocks - 1)), own)}, schemes, method="gptq")
    plan = replace(plan, damage={f"model.layers.{i} mlp: W4 g16": 0.002 * (i + 1) for i in range(blocks)})
    return ExampleRecord(
        source,
        Recipe.from_dict({"name": "w4a16", "steps": [{"quantize": {"method": "gptq"}}]}).to_dict(),
        plan,
        ShrinkReport(
            seed=3,
            calibration={"description": "128 x 512 tokens that the model wrote"},
            parameters_before=120_000,
            parameters_after=100_000,
            bytes_before=480_000,
            bytes_after=120_000,
            seconds={"calibrate": 1.5, "total": 264.25},
            notes=["group size 128 does not divide 48; 16 is used", "<b>note & more</b>"],
            block_errors={f"model.layers.{i}": 0.01 * (i + 1) for i in range(blocks - 1)},
            evaluation=evaluation(),
            completions=[
                {"prompt": "The <tide>", "dense": " goes out", "compressed": "```goes``` & comes"},
                {"prompt": "The ebb", "dense": "comes", "compressed": "\n"},
            ],
            layout=layout(blocks),
            machine={"processor": "A processor", "cores": 2, "memory_gb": 24.0, "threads": 1, "device": "cpu"},
        ),
        {"hf_shrink": "0.1.0", "torch": "2.13.0"},
    )


def evaluation() -> dict[str, Any]:
    spread = {"dense": [19.0, 21.0], "compressed": [28.5, 31.5]}
    return {
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
            "made_up_metric": 0.5,
        },
        "excess_loss": figure(0.08),
        "skipped": {},
        "speed": {"unit": "tokens/s", "dense": 20.0, "compressed": 30.0, "speedup": 1.5, "spread": spread},
    }


def searched_record(blocks: int = 4) -> ExampleRecord:
    """As `full_record`, with what a search and a sweep leave in a plan."""
    record = full_record(blocks=blocks)
    said = {"limits": {"bytes": 80_000_000}, "bytes": 79_900_000, "predicted_kl": 0.05, "measured_kl": 0.04}
    plan = front(replace(record.plan, search=said), blocks).plan("30%")
    return replace(record, plan=plan)


def front(plan: Plan, blocks: int = 4) -> Front:
    import json

    paid = {"bits": 5e7, "width": 1e7, "depth": 2e6}
    by_group = {f"model.layers.{i} mlp": {"bits": 5e7 * (1 + i % 3), "width": 1e7} for i in range(blocks)}
    said = json.loads(plan.to_json())
    points = (
        Point("dense", "dense", 269_000_000, 300_000_000, 0.0, 20.0),
        Point("W4", "uniform", 120_000_000, 150_000_000, 0.05, 21.5),
        Point("30%", "plan", 80_000_000, 110_000_000, 0.04, 21.0, {}, 0.05, paid, by_group, said),
        Point("22%", "plan", 59_000_000, 90_000_000, 0.4, 30.0, {}, 0.5, paid, by_group),
    )
    worth = {
        f"model.layers.{i} {part}": {f"W{bits} g16": 0.5 * (1 + i % 5) / 4**bits for bits in (2, 3, 4, 8)}
        for i in range(blocks)
        for part in ("attention in", "mlp out")
    }
    worth["lm_head"] = {"W4 g16": 0.1}
    worth |= {f"model.layers.{i}": {"dropped": 0.02 * (i + 1)} for i in range(1, blocks)}
    return Front("tiny", "bytes", points, "made-up data", 4096, {"sensitivity": 1.0}, worth)


def bare_record() -> ExampleRecord:
    """Nothing measured, nothing quantized."""
    recipe = {"steps": [{"prune": {"what": "depth", "method": "kl_greedy", "blocks": 1}}]}
    plan = Plan("llama", {"decoder": StackPlan(kept=(0, 2))})
    report = ShrinkReport(portable=False, not_portable_because=["blocks of <unequal> width"])
    return ExampleRecord("/somewhere/private/dense-model", recipe, plan, report)
