"""Plans block by block, and fronts: in the terminal, as HTML and as pictures."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from tiny import tiny_llama

from hf_shrink.architectures import bind
from hf_shrink.errors import RecipeError
from hf_shrink.front import Front, Point
from hf_shrink.plan import BlockPlan, Plan, Scheme, StackPlan
from hf_shrink.reporting.front_chart import front_html, front_lines, write_front
from hf_shrink.reporting.layout import BlockLayout, layout_of
from hf_shrink.reporting.plan_chart import write_plan_map
from hf_shrink.reporting.plan_map import plan_map
from hf_shrink.reporting.plan_rows import Share, plan_rows
from hf_shrink.reporting.plan_table import plain_plan, print_plan

PNG = b"\x89PNG\r\n"


def plan() -> Plan:
    """Of the tiny Llama: block 0 in mixed bits, block 1 narrower, block 2 dropped, block 3 without its MLP."""
    first = "model.layers.0."
    schemes = {f"{first}self_attn.{name}_proj": Scheme(4) for name in "qkv"}
    schemes |= {f"{first}self_attn.o_proj": Scheme(3), f"{first}mlp.down_proj": Scheme(2)}
    blocks = {1: BlockPlan(query_heads=(0, 1, 2, 3), channels=tuple(range(60))), 3: BlockPlan(removed=("mlp",))}
    damage = {
        "model.layers.0 attention: W4": 0.02,
        "model.layers.0 mlp: W2": 0.01,
        "model.layers.1 mlp: 60 channels": 0.003,
        "model.layers.11 mlp: not there": 5.0,
        "lm_head: W8": 0.001,
    }
    stacks = {"decoder": StackPlan((0, 1, 3), blocks)}
    return Plan("llama", stacks, {**schemes, "lm_head": Scheme(8)}, method="gptq", damage=damage)


def test_rows_say_what_is_left_of_every_block() -> None:
    rows = plan_rows(plan(), layout_of(bind(tiny_llama())))
    assert [row.removed for row in rows] == [(), (), ("block",), ("mlp",)]
    assert rows[0].bits == {"attention": (4, 3), "mlp": (None, 2)}
    assert [rows[0].said_bits(part) for part in ("attention", "mlp", "experts")] == ["4/3", "dense/2", "-"]
    assert rows[0].roles["output"] == ("attention", (3,)) and rows[0].roles["gate"] == ("mlp", (None,))
    assert rows[1].units == {"groups": Share(2, 3), "heads": Share(4, 6), "channels": Share(60, 80)}
    assert rows[0].damage == pytest.approx(0.03)
    assert rows[1].damage == pytest.approx(0.003)
    assert rows[3].damage is None
    assert rows[3].said_bits("mlp") == "-"


def test_the_table_names_bits_units_and_what_goes() -> None:
    text = plain_plan(plan(), bind(tiny_llama()))
    assert text.isascii()
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert "4/3" in lines["0"]
    assert "##########" in lines["0"]
    assert "60 of 80" in lines["1"]
    assert "2 of 3" in lines["1"]
    assert lines["2"].count("dropped") == 2
    assert "out" in lines["3"]
    assert "lm_head: 8 bits, predicted KL 0.001" in text
    quantized = plain_plan(Plan("llama", schemes={"model.layers.0.mlp.up_proj": Scheme(4)}), bind(tiny_llama()))
    assert "predicted" not in quantized


def test_colours_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    print_plan(plan(), bind(tiny_llama()), file=out)
    assert "\x1b[" in out.getvalue()


def test_maps(tmp_path: Path) -> None:
    binding = bind(tiny_llama())
    picture = plan_map(plan_rows(plan(), layout_of(binding)))
    for said in ("block 2: dropped", "block 1: 60 of 80 channels", "block 0, down: 2 bits", "block 3: without mlp"):
        assert f'title="{said}"' in picture
    for line in ("query", "gate", "KV groups", "channels", "predicted KL, 1e-3"):
        assert f'<th scope="row">{line}</th>' in picture
    page = write_plan_map(plan(), binding, tmp_path / "plan.html").read_text()
    assert picture in page
    assert write_plan_map(plan(), binding, tmp_path / "plan.png").read_bytes().startswith(PNG)
    with pytest.raises(RecipeError, match=r"\.png or \.html"):
        write_plan_map(plan(), binding, tmp_path / "plan.txt")


def front() -> Front:
    paid = {"bits": 5e7, "width": 1e7, "depth": 0.0}
    by_group = {"model.layers.0 mlp": {"bits": 5e7, "width": 1e7}}
    points = (
        Point("dense", "dense", 269_000_000, 300_000_000, 0.0, 20.0),
        Point("W4", "uniform", 120_000_000, 150_000_000, 0.05, 21.5),
        Point(
            "30%", "plan", 80_000_000, 110_000_000, 0.04, 21.0, {}, 0.05, paid, by_group, json.loads(plan().to_json())
        ),
        Point("22%", "plan", 59_000_000, 90_000_000, 0.4, 30.0, {}, 0.5, paid, by_group),
    )
    return Front("tiny", "bytes", points, "made-up data", 4096, {"sensitivity": 1.0})


def test_fronts(tmp_path: Path) -> None:
    found = front()
    path = tmp_path / "front.json"
    found.to_json(path)
    assert Front.from_json(path) == found
    lines = front_lines(found)
    assert [line.split()[0] for line in lines[1:]] == ["22%", "30%", "W4", "dense"]
    assert "83% / 17% / 0%" in lines[2]
    page = front_html(found)
    assert "model.layers.0 mlp: 50 MB by bits" in page
    assert page.count("<circle") == 4
    assert write_front(found, tmp_path / "front.html").read_text() == page
    assert write_front(found, tmp_path / "front.png").read_bytes().startswith(PNG)
    said = found.plan("30%").search["front"]
    assert said["chosen"] == "30%" and Front.from_dict(said).points[2].plan is None
    with pytest.raises(RecipeError, match="there are plans for 30%"):
        found.plan("31%")
    with pytest.raises(RecipeError, match="not a front"):
        Front.from_json('{"points": []}')


def test_layouts_of_experts_and_of_matrices_with_several_roles(tmp_path: Path) -> None:
    parts = {
        "attention": {"query + key + value": ("attn.qkv",)},
        "experts": {"up": ("moe.experts.*.up",)},
        "others": {"others": ("a", "b")},
    }
    block = BlockLayout("decoder", 0, "layers.0", parts, {"experts": 3})
    assert BlockLayout(**json.loads(json.dumps(block.to_dict()))).matches("others", "others", {"layers.0.b"}) == [
        None,
        "layers.0.b",
    ]
    schemes = {f"layers.0.moe.experts.{expert}.up": Scheme(4 if expert else 8) for expert in (0, 1)}
    found = Plan("made up", {"decoder": StackPlan((0,), {0: BlockPlan(experts=(0, 1))})}, schemes)
    (row,) = plan_rows(found, [block])
    assert row.roles["query + key + value"] == ("attention", (None,)) and row.roles["expert up"] == ("experts", (8, 4))
    assert row.units == {"experts": Share(2, 3)}
