"""Vocabulary pruning from the recipe to the saved folder: model, tokenizer, batches and figures agree."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from stock import Stock
from tiny import QUICK_GPTQ, tiny_llama
from tokenizers_of_all_kinds import EXTRA, KINDS, SEEN, UNSEEN, fast_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForMaskedLM, PreTrainedModel

from hf_shrink import Plan, evaluate_model, make_plan, shrink, shrink_checkpoint
from hf_shrink.cli import main
from hf_shrink.errors import ArchitectureError, RecipeError
from hf_shrink.pipeline.vocabulary import Spelling
from hf_shrink.surgery.tokenizer import fast_json, rewrite, token_table

TEXTS = [SEEN * 12]
SMALL = {"samples": 6, "length": 24, "batch_size": 3}


def recipe(*more: dict[str, Any], **options: Any) -> dict[str, Any]:
    step = {"prune": {"what": "vocabulary", "method": "seen", "multiple_of": 8, **options}}
    return {"calibration": SMALL, "evaluation": {"metrics": []}, "steps": [step, *more]}


def model_for(tokenizer: Any, **changes: Any) -> PreTrainedModel:
    """Some rows more than the tokenizer has tokens, as many models have."""
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    return tiny_llama(vocab_size=len(tokenizer) + 5, **ids, **changes)


def logits_of(model: PreTrainedModel, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


@dataclass
class Run:
    dense: PreTrainedModel
    before: Any
    model: PreTrainedModel
    tokenizer: Any
    folder: Path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, stock_process: Stock) -> dict[str, Run]:
    """One run a kind of tokenizer, every other one of a model with a tied head; loaded in stock all at once."""
    found = {}
    for number, kind in enumerate(KINDS):
        tokenizer, before = fast_tokenizer(kind), fast_tokenizer(kind)
        dense = model_for(before, tie_word_embeddings=bool(number % 2))
        model = shrink(copy.deepcopy(dense), recipe(), tokenizer=tokenizer, calibration=TEXTS, progress=False)
        found[kind] = Run(dense, before, model, tokenizer, tmp_path_factory.mktemp(kind))
        model.save_pretrained(found[kind].folder)
    jobs = [{"folder": str(run.folder), "class": "LlamaForCausalLM", "text": SEEN} for run in found.values()]
    stock_process.run(jobs)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_kept_tokens_are_as_before(kind: str, runs: dict[str, Run]) -> None:
    run = runs[kind]
    assert len(run.tokenizer) < len(run.before)
    assert run.model.config.vocab_size % 8 == 0 and run.model.config.vocab_size < run.dense.config.vocab_size
    kept = [i for i in run.model.shrink_record.plan.vocabulary.ids if i < run.dense.config.vocab_size]
    ids, old = run.tokenizer(SEEN)["input_ids"], run.before(SEEN)["input_ids"]
    assert [kept[index] for index in ids] == old
    torch.testing.assert_close(logits_of(run.model, ids), logits_of(run.dense, old)[:, kept], rtol=1e-5, atol=1e-5)
    assert run.model.config.eos_token_id == run.model.generation_config.eos_token_id == run.tokenizer.eos_token_id
    assert run.model.shrink_report.portable


@pytest.mark.parametrize("kind", KINDS)
def test_stock_loads_model_and_tokenizer(kind: str, runs: dict[str, Run]) -> None:
    run = runs[kind]
    ids = run.tokenizer(SEEN)["input_ids"]
    stock_ids, stock_logits, written = torch.load(run.folder / "stock.pt")
    assert stock_ids == ids
    torch.testing.assert_close(stock_logits, logits_of(run.model, ids), rtol=1e-5, atol=1e-5)
    assert torch.equal(written, run.model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=8))


def test_generation_ends_with_the_end_token() -> None:
    tokenizer = fast_tokenizer("byte_level")
    model = model_for(tokenizer)
    with torch.no_grad():  # writes nothing but the end
        model.lm_head.weight.zero_()
        model.lm_head.weight[tokenizer.eos_token_id] = model.model.norm.weight
        model.model.norm.weight.abs_()
    small = shrink(model, recipe(), tokenizer=tokenizer, calibration=TEXTS, progress=False)
    ids = torch.tensor([tokenizer(SEEN)["input_ids"]])
    with torch.no_grad():
        small.lm_head.weight[small.config.eos_token_id] *= torch.sign(
            small(ids).logits[0, -1, small.config.eos_token_id]
        )
    written = small.generate(ids, do_sample=False, max_new_tokens=8)
    assert written.shape[1] == ids.shape[1] + 1
    assert tokenizer.decode(written[0, -1]) == "</s>"


def test_it_goes_with_every_other_step() -> None:
    """The plan is made with the old tokens, carried out with the new ones, and the same again from its JSON."""
    more = [
        {"prune": {"what": "width", "method": "wanda", "ratio": 0.1, "units": "mlp"}},
        {
            "quantize": {
                **QUICK_GPTQ,
                "scheme": "W8A16",
                "group_size": 16,
                "overrides": {"lm_head": {}},
                "ignore": [],
            }
        },
    ]
    dense = model_for(fast_tokenizer("byte_level"))
    results = []
    plan = make_plan(dense, recipe(*more), tokenizer=fast_tokenizer("byte_level"), calibration=TEXTS, progress=False)
    for asked in (recipe(*more), Plan.from_json(plan.to_json())):
        tokenizer = fast_tokenizer("byte_level")
        model = shrink(copy.deepcopy(dense), asked, tokenizer=tokenizer, calibration=TEXTS, progress=False)
        results.append(logits_of(model, tokenizer(SEEN)["input_ids"]))
    assert results[0].shape[-1] == model.config.vocab_size
    expected = logits_of(dense, fast_tokenizer("byte_level")(SEEN)["input_ids"])
    kept = [index for index in plan.vocabulary.ids if index < dense.config.vocab_size]
    assert (results[0] - expected[:, kept]).norm() < 0.9 * expected.norm()


def test_a_plan_is_for_one_tokenizer_and_needs_no_data() -> None:
    dense = model_for(fast_tokenizer("byte_level"))
    plan = make_plan(dense, recipe(), tokenizer=fast_tokenizer("byte_level"), calibration=TEXTS, progress=False)
    with pytest.raises(RecipeError, match="not that of this tokenizer"):
        shrink(copy.deepcopy(dense), plan, tokenizer=fast_tokenizer("wordpiece"), progress=False)
    model = shrink(dense, plan, tokenizer=fast_tokenizer("byte_level"), progress=False)
    assert model.config.vocab_size == sum(index < plan.vocabulary.rows for index in plan.vocabulary.ids)


def test_bert_keeps_its_bias_and_reads_masks() -> None:
    tokenizer, before = fast_tokenizer("wordpiece"), fast_tokenizer("wordpiece")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    dense = BertForMaskedLM(BertConfig(vocab_size=len(before), pad_token_id=0, **sizes)).eval()
    with torch.no_grad():
        dense.cls.predictions.bias.normal_()
    model = shrink(copy.deepcopy(dense), recipe(), tokenizer=tokenizer, calibration=TEXTS, progress=False)
    kept = list(model.shrink_record.plan.vocabulary.ids)
    text = SEEN.replace("child", "<mask>")
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.mask_token_id in ids
    found = logits_of(model, ids)
    torch.testing.assert_close(found, logits_of(dense, before(text)["input_ids"])[:, kept], rtol=1e-5, atol=1e-5)


def test_tokens_that_are_gone_are_spelled_in_the_batches() -> None:
    tokenizer = fast_tokenizer("byte_level")
    text = fast_json(tokenizer)
    table = token_table(text)
    kept = set(table.values()) - {table["Ġchild"]} if "Ġchild" in table else set(table.values()) - {table["Ġthe"]}
    (gone,) = set(table.values()) - kept
    after = rewrite(text, kept)
    spelling = Spelling.of(text, after.text, after.new_ids)
    others = sorted(kept)[50:54]
    batch = {
        "input_ids": torch.tensor([[others[0], gone, others[1], others[2]], others]),
        "attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]),
    }
    new = spelling.batch(batch)
    parts, ids = spelling.ids(gone), after.new_ids
    assert len(parts) > 1
    assert new["input_ids"].tolist()[0] == [ids[others[0]], *parts, ids[others[1]], ids[others[2]]][:4]
    assert new["attention_mask"].tolist()[0] == [0, *[1] * len(parts), 1, 1][:4]
    assert new["input_ids"].tolist()[1] == [ids[index] for index in others]
    labels = {"input_ids": torch.tensor([others]), "labels": torch.tensor([[-100, *others[1:]]])}
    assert spelling.undone(spelling.batch(labels))["labels"].tolist() == labels["labels"].tolist()


def test_rare_tokens_go_too_where_a_count_is_asked_for() -> None:
    sizes = []
    for least in (1, 20):
        tokenizer = fast_tokenizer("byte_level")
        model = model_for(tokenizer)
        texts = [SEEN * 12 + UNSEEN * 2]
        shrink(model, recipe(min_count=least, multiple_of=1), tokenizer=tokenizer, calibration=texts, progress=False)
        sizes.append(model.config.vocab_size)
        assert tokenizer.decode(tokenizer(UNSEEN, add_special_tokens=False)["input_ids"]) == UNSEEN
    assert sizes[1] < sizes[0]


def test_texts_of_one_s_own_are_read_whole(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text(UNSEEN + "\n\n" + SEEN)
    (tmp_path / "more.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in (SEEN, EXTRA)))
    files = [str(tmp_path / name) for name in ("notes.txt", "more.jsonl")]
    tokenizer, before = fast_tokenizer("byte_fallback"), fast_tokenizer("byte_fallback")
    model = shrink(model_for(before), recipe(texts=files, multiple_of=1), tokenizer=tokenizer, progress=False)
    for text in (SEEN, UNSEEN, EXTRA):
        assert tokenizer.tokenize(text) == before.tokenize(text)
    (note,) = [note for note in model.shrink_report.notes if "tokens stay" in note]
    assert "notes.txt" in note and f"{model.config.vocab_size:,} of" in note
    short = shrink(
        model_for(before),
        recipe(texts=files, tokens=5, multiple_of=1),
        tokenizer=fast_tokenizer("byte_fallback"),
        progress=False,
    )
    assert any("only the first 5 tokens" in note for note in short.shrink_report.notes)
    assert short.config.vocab_size < model.config.vocab_size


def test_both_models_are_measured_on_the_same_text(tmp_path: Path) -> None:
    """Where the pieces are the same, the likelihoods are those of the dense model among the tokens that are left."""
    before = fast_tokenizer("byte_level")
    dense = model_for(before)
    dense.save_pretrained(tmp_path / "dense")
    before.save_pretrained(tmp_path / "dense")
    (tmp_path / "seen.txt").write_text(SEEN * 12)
    (tmp_path / "other.txt").write_text((UNSEEN + EXTRA) * 6)
    asked = recipe(texts=[str(tmp_path / "seen.txt")])
    asked["evaluation"] = {"data": str(tmp_path / "seen.txt"), "samples": 3, "length": 20}
    report = shrink_checkpoint(tmp_path / "dense", tmp_path / "small", asked, progress=False)
    figures = report.evaluation
    assert -1 < figures["excess_loss"]["value"] < 0, "fewer tokens to choose from, and nothing else"
    assert figures["skipped"].keys() == {"kl_divergence", "top1_agreement"}
    names = {path.name for path in (tmp_path / "small").iterdir()}
    assert {"tokenizer.json", "generation_config.json"} <= names
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "small")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert len(tokenizer) <= model.config.vocab_size < dense.config.vocab_size
    # By hand, on text that is cut into more tokens now.
    ids, old = (
        tokenizer(UNSEEN, add_special_tokens=False)["input_ids"],
        before(UNSEEN, add_special_tokens=False)["input_ids"],
    )
    assert len(ids) > len(old)
    own, loss = (
        float(-logits_of(m, i)[:-1].log_softmax(-1).gather(1, torch.tensor(i[1:])[:, None]).sum())
        for m, i in ((model, ids), (dense, old))
    )
    batch = {"input_ids": torch.tensor([old])}
    result = evaluate_model(
        model, [batch], baseline=dense, tokenizer=tokenizer, baseline_tokenizer=before, metrics=["perplexity"]
    )
    assert result["excess_loss"]["value"] == pytest.approx((own - loss) / (len(ids) - 1), rel=1e-4)
    out = tmp_path / "figures.json"
    data = ["--data", str(tmp_path / "other.txt"), "--samples", "2", "--length", "20", "--json", str(out), "--quiet"]
    assert main(["evaluate", str(tmp_path / "small"), "--baseline", str(tmp_path / "dense"), *data]) == 0
    assert json.loads(out.read_text())["baseline"]["perplexity"]["value"] > 1


def test_overlapping_windows_are_scored_where_the_dense_model_s_are(runs: dict[str, Run], tmp_path: Path) -> None:
    run, stride = runs["byte_level"], 7
    text, path = (UNSEEN + " " + SEEN + " ") * 3, tmp_path / "text.txt"
    path.write_text(text)
    spec = {"samples": 3, "length": 20, "batch_size": 2, "stride": stride}
    result = evaluate_model(
        run.model, path, baseline=run.dense, tokenizer=run.tokenizer, baseline_tokenizer=run.before, spec=spec
    )

    def likelihood(model: PreTrainedModel, tokenizer: Any, context: str, new: str) -> tuple[float, int]:
        """Summed over the tokens that begin in `new`, and their number."""
        ids = tokenizer(context + new)["input_ids"]  # with <s>
        first = next(k for k in range(1, len(ids)) if len(tokenizer.decode(ids[1:k])) >= len(context))
        losses = -logits_of(model, ids)[first - 1 : -1].log_softmax(-1)
        return float(losses.gather(1, torch.tensor(ids[first:])[:, None]).sum()), len(ids) - first

    old = run.before(text, add_special_tokens=False)["input_ids"][: 3 * 19]
    totals, counts, done = [0.0, 0.0], [0, 0], 0
    while done < len(old):
        stop = 19 if not done else min(done + stride, len(old))
        parts = [run.before.decode(old[slice(*ends)]) for ends in ((stop - 19, done), (done, stop))]
        for i, (model, tokenizer) in enumerate(((run.model, run.tokenizer), (run.dense, run.before))):
            total, count = likelihood(model, tokenizer, *parts)
            totals[i], counts[i] = totals[i] + total, counts[i] + count
        done = stop
    assert counts[0] > counts[1] == len(old)
    assert (result["tokens"], result["stride"]) == (counts[0], stride)
    assert result["model"]["perplexity"]["value"] == pytest.approx(math.exp(totals[0] / counts[0]), rel=1e-4)
    assert result["excess_loss"]["value"] == pytest.approx((totals[0] - totals[1]) / counts[0], rel=1e-4)


def test_refusals_leave_everything_as_it_was() -> None:
    tokenizer = fast_tokenizer("byte_level")
    model = model_for(tokenizer)
    before, text = model.lm_head.weight.clone(), fast_json(tokenizer)
    with pytest.raises(RecipeError, match="pass tokenizer="):
        shrink(model, recipe(), calibration=[{"input_ids": torch.tensor([[5, 6, 7]])}], progress=False)
    exact = tiny_llama(vocab_size=len(tokenizer))
    with pytest.raises(RecipeError, match="do nothing"):
        shrink(exact, recipe(multiple_of=400), tokenizer=tokenizer, calibration=TEXTS, progress=False)
    with pytest.raises(RecipeError, match="list of files"):
        shrink(model, recipe(texts="notes.txt"), tokenizer=tokenizer, progress=False)
    with pytest.raises(RecipeError, match="min_count must be"):
        shrink(model, recipe(min_count=0), tokenizer=tokenizer, progress=False)
    with pytest.raises(ArchitectureError, match="only transformers models"):
        shrink(torch.nn.Linear(4, 4), recipe(texts=["a.txt"]), progress=False)
    assert torch.equal(model.lm_head.weight, before) and fast_json(tokenizer) == text


def test_default_data_is_the_model_s_own_text() -> None:
    tokenizer = fast_tokenizer("byte_level")
    model = model_for(tokenizer)
    asked = recipe(multiple_of=1)
    asked["calibration"] = {**SMALL, "samples": 2}
    small = shrink(model, asked, tokenizer=tokenizer, progress=False)
    assert len(tokenizer) <= small.config.vocab_size < 327
