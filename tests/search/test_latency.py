"""The table of this device: measured once, kept on disk; and seconds of options that add up to the model's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conformance.cases import CASES
from conformance.cases_encoders import CASES as ENCODERS
from tiny import tiny_llama
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from hf_shrink.architectures import bind
from hf_shrink.calibration.inputs import longest_text
from hf_shrink.errors import ArchitectureError
from hf_shrink.plan import Plan, Scheme
from hf_shrink.search import latency
from hf_shrink.search.latency import PURPOSES, LatencyTable, build_linear, check_timed, model_seconds, rest_of_blocks
from hf_shrink.search.measuring import Space
from hf_shrink.search.problem import make_problem
from hf_shrink.search.sensitivity import Rounding, Sensitivity

W4 = Scheme(4, group_size=16)


def test_a_product_is_measured_once_for_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "BEYOND_CACHES", 1 << 16)
    built: list[tuple[int, int]] = []

    def build(rows: int, columns: int, *others: object) -> nn.Module:
        built.append((rows, columns))
        return build_linear(rows, columns, *others)  # type: ignore[arg-type]

    table = LatencyTable.open(torch.float32, folder=tmp_path)
    table.build = build
    first = table.matrix(64, 32, W4)
    assert first.keys() == {"decode", "prefill"} and min(first.values()) > 0
    assert len(built) > 1, "more copies than caches hold"
    count = len(built)
    table.matrix(64, 32, None)
    table.save()
    again = LatencyTable.open(torch.float32, folder=tmp_path)
    again.build = build
    assert again.matrix(64, 32, W4) == first
    assert len(built) > count
    assert not LatencyTable.open(torch.bfloat16, folder=tmp_path).known
    assert table.path is not None
    table.path.write_text("{")
    assert not LatencyTable.open(torch.float32, folder=tmp_path).known


def test_seconds_add_up_to_those_of_the_dense_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices by the table, what is left in equal shares of the blocks, the head outside of them."""
    model = tiny_llama()
    binding, space = bind(model), Space((W4,), width=False)
    monkeypatch.setattr(latency, "model_seconds", lambda _: {"decode": 1.0, "prefill": 1e-9})

    class Counted(LatencyTable):
        def matrix(self, rows: int, columns: int, scheme: Scheme | None) -> dict[str, float]:
            seconds = rows * columns * (32 if scheme is None else scheme.bits) * 1e-8
            return {"decode": seconds, "prefill": seconds}

    pieces = [
        f"model.layers.{i} {part} {side}" for i in range(4) for part in ("attention", "mlp") for side in ("in", "out")
    ]
    sensitivity = Sensitivity(
        {name: Rounding({W4: 1.0}) for name in pieces}, {}, {}, {("decoder", i, None): 1.0 for i in range(4)}
    )
    paths = {path for block in binding.blocks for path in block.roles}
    table = Counted(torch.float32, torch.device("cpu"))
    problem = make_problem(model, binding, space, sensitivity, paths, Plan("llama"), latency=table)
    assert problem.dense.seconds["decode"] == pytest.approx(1.0)
    assert problem.dense.seconds["prefill"] > 1e-4, "matrices are not made cheaper to fit a wrong whole"
    choice = [0] * len(problem.groups)
    for group, option in problem.links[0]:
        choice[group] = option
    head = 320 * 48 * 32 * 1e-8
    assert problem.cost(choice).seconds["decode"] == pytest.approx(head + (1 - head) * 3 / 4)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_a_model_is_timed_by_what_it_can_do() -> None:
    assert model_seconds(tiny_llama()).keys() == {"decode", "prefill"}
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
    with pytest.raises(ArchitectureError, match="give a budget in bytes"):
        model_seconds(T5ForConditionalGeneration(T5Config(**sizes)))


@pytest.mark.parametrize("name", ["gpt2", "bert_masked_lm", "roberta_classifier", "clip_text"])
def test_a_model_is_timed_with_no_more_tokens_than_it_has_positions_for(name: str) -> None:
    model = (CASES.get(name) or ENCODERS[name]).build()
    assert 0 < longest_text(model) < PURPOSES["prefill"]
    seconds = model_seconds(model)
    assert seconds.keys() == ({"decode", "prefill"} if model.can_generate() else {"prefill"})
    assert min(seconds.values()) > 0


def test_what_a_model_does_not_do_is_not_limited() -> None:
    with pytest.raises(ArchitectureError, match=r"BertForMaskedLM writes no tokens.*--budget latency:prefill:60%"):
        check_timed(ENCODERS["bert_masked_lm"].build(), ["decode"])
    check_timed(ENCODERS["bert_masked_lm"].build(), ["prefill"])
    few = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=8, n_layer=1, n_head=2, n_positions=6))
    assert model_seconds(few).keys() == {"prefill"}
    with pytest.raises(ArchitectureError, match=r"positions for 6 tokens, too few"):
        check_timed(few, ["decode", "prefill"])


def test_a_model_is_timed_once_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[nn.Module] = []

    def once(model: nn.Module) -> dict[str, float]:
        timed.append(model)
        return {"decode": float(len(timed)), "prefill": 1.0}

    monkeypatch.setattr(latency, "model_seconds", once)
    model = tiny_llama(num_hidden_layers=2)
    blocks = list(model.model.layers)
    table = LatencyTable(torch.float32, torch.device("cpu"))
    assert rest_of_blocks(model, blocks, table) == rest_of_blocks(model, blocks, table)
    rest_of_blocks(tiny_llama(num_hidden_layers=2), blocks, table)
    rest_of_blocks(model.bfloat16(), blocks, table.beside(torch.bfloat16))
    assert len(timed) == 3


def test_a_table_knows_those_beside_it(tmp_path: Path) -> None:
    table = LatencyTable.open(torch.bfloat16, folder=tmp_path)
    beside = table.beside(torch.float32)
    seconds = beside.matrix(64, 32, None)
    beside.save()
    assert table.beside(torch.float32).matrix(64, 32, None) == seconds
    assert not LatencyTable.open(torch.bfloat16, folder=tmp_path).known
