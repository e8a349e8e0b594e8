from __future__ import annotations

import copy

import pytest
import torch
from tiny import VOCABULARY, tiny_llama, tiny_tokenizer
from tiny_readers import CLS, MASK, SEP, encoder_tokenizer, tiny_bert, tiny_bert_mlm, tiny_roberta_mlm, tiny_t5
from transformers import LlamaForSequenceClassification

from hf_shrink.calibration import sampling
from hf_shrink.calibration.data import CalibrationData, calibration_batches
from hf_shrink.calibration.generate import Writer
from hf_shrink.calibration.inputs import inputs_of
from hf_shrink.calibration.sampling import sample_tokens
from hf_shrink.calibration.text import Framing
from hf_shrink.errors import CalibrationError
from hf_shrink.recipe import CalibrationSpec
from hf_shrink.runtime.attention import NAME

CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}:{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>bot:{% endif %}"
)


def write(samples: int = 6, length: int = 24, batch_size: int = 4, **options: object) -> CalibrationData:
    options = {"model": tiny_llama(), "tokenizer": tiny_tokenizer(), **options}
    return calibration_batches(CalibrationSpec("self", samples, length, batch_size), **options)


def rows_of(data: CalibrationData) -> torch.Tensor:
    return torch.cat([batch["input_ids"] for batch in data.batches])


def eager_to_end(favour: int, strength: float = 6.0, **changes: object):
    """A model that often says one token: adds to the logit of `favour`."""
    model = tiny_llama(**changes)
    model.lm_head = torch.nn.Linear(48, VOCABULARY)
    torch.nn.init.normal_(model.lm_head.weight, std=0.2)
    torch.nn.init.zeros_(model.lm_head.bias)
    model.lm_head.bias.data[favour] = strength
    return model


def test_shapes_batches_and_details():
    data = write()
    assert [tuple(b["input_ids"].shape) for b in data.batches] == [(4, 24), (2, 24)]
    assert rows_of(data).dtype == torch.int64
    assert data.tokens == 6 * 24
    assert data.details["temperature"] == 1.0 and data.details["seed"] == 0 and data.details["source"] == "self"
    assert data.description == "6 x 24 tokens written by the model (temperature 1)"
    assert data.notes == ()


def test_the_seed_decides_and_the_global_random_state_is_left_alone():
    model = tiny_llama()
    before = torch.random.get_rng_state()
    first, again, other = (rows_of(write(seed=seed, model=model)) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.manual_seed(99)
    assert torch.equal(first, rows_of(write(seed=1, model=model)))


def test_evaluation_text_is_not_the_calibration_text():
    rows = [rows_of(write(seed=3, purpose=purpose)).tolist() for purpose in ("calibration", "evaluation")]
    assert {tuple(r[:8]) for r in rows[0]}.isdisjoint(tuple(r[:8]) for r in rows[1])


def test_the_model_its_mode_and_its_generation_settings_come_back_unchanged():
    model = tiny_llama().train()
    own = model.generation_config
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    write(model=model)
    assert model.training and model.generation_config is own
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_single_tokens_attend_by_groups_while_it_writes(monkeypatch):
    model, used = tiny_llama(), set()
    monkeypatch.setattr(sampling, "sample_tokens", lambda *given: used.add(model.config._attn_implementation) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        calibration_batches(CalibrationSpec(samples=2, length=8), model=model)
    assert used == {NAME} and model.config._attn_implementation == "sdpa"


def test_the_models_own_generation_settings_do_not_matter():
    model = tiny_llama()
    expected = rows_of(write(model=model))
    model.generation_config.update(repetition_penalty=5.0, max_length=5, top_k=1, num_beams=3, do_sample=True)
    assert torch.equal(rows_of(write(model=model)), expected)


def test_tokens_follow_the_models_distribution():
    """Sampled pairs against the exact probabilities of the second token given the first."""
    model = tiny_llama()
    model.lm_head.weight.data[:20] *= 4  # some tokens far likelier than others
    rows = rows_of(write(samples=3000, length=2, batch_size=3000, model=model))
    choices = torch.tensor(sorted(set(rows[:, 0].tolist())))
    assert len(choices) > 100  # starts are diverse
    with torch.no_grad():
        logits = model(choices[:, None]).logits[:, -1].double()
    logits[:, [0, 1]] = -torch.inf  # <pad> and <s> are never drawn
    weight = torch.bincount(rows[:, 0], minlength=VOCABULARY)[choices].double() / len(rows)
    expected = weight @ logits.softmax(-1)
    measured = torch.bincount(rows[:, 1], minlength=VOCABULARY).double() / len(rows)
    # The distance between 3000 exact draws and their distribution is about 0.1.
    assert (measured - expected).abs().sum() / 2 < 0.15
    assert (measured - 1 / VOCABULARY).abs().sum() / 2 > 0.25


def test_a_cached_continuation_is_what_the_full_forward_predicts():
    """Near temperature 0 every token must be the most likely one of a forward over the whole row."""
    model = tiny_llama()
    writer = Writer(model, inputs_of(model), tiny_tokenizer(), Framing(), seed=0, temperature=1e-4)
    rows = writer.text(3, 20).rows
    with torch.no_grad():
        logits = model(rows).logits[:, :-1]
    logits[..., [0, 1]] = -torch.inf
    drawn = rows[:, 1:]
    after_end = rows[:, :-1].eq(2)  # there a new random start is put in
    assert torch.equal(logits.argmax(-1)[~after_end], drawn[~after_end])


def test_special_tokens_are_never_drawn_and_an_end_does_not_end_a_row():
    rows = rows_of(write(samples=16, length=64, model=eager_to_end(2)))
    assert rows.eq(2).sum() > 100
    assert not torch.isin(rows, torch.tensor([0, 1])).any()
    following = rows[:, 1:][rows[:, :-1].eq(2)]
    # Behind an end comes a new start, which is random text and therefore not another end.
    assert len(following) > 100 and not following.eq(2).any() and len(following.unique()) > 20


def test_padding_of_the_vocabulary_is_never_drawn():
    rows = rows_of(write(samples=16, length=32, model=tiny_llama(vocab_size=VOCABULARY + 200)))
    assert rows.max() < VOCABULARY


def test_chats_open_with_the_template_and_take_turns():
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = CHAT_TEMPLATE
    data = write(samples=8, length=100, model=eager_to_end(2, 4.5), tokenizer=tokenizer)
    assert data.details["chats"] == 4
    texts = [tokenizer.decode(row) for row in rows_of(data)]
    chats = [text for text in texts if text.startswith("<s>user:")]
    assert len(chats) == 4
    assert all("<s>" not in text for text in texts if text not in chats)
    for text in chats:
        turns = text.split("</s>")
        assert len(turns) > 2
        for number, turn in enumerate(turns[:-1]):
            assert turn.startswith("<s>bot:" if number % 2 else "<s>user:"), (number, turn)


def test_progress_counts_every_token():
    calls: list[tuple[str, int, int]] = []
    write(samples=3, length=10, progress=lambda *call: calls.append(call))
    assert [done for _, done, _ in calls] == list(range(3, 28, 3))
    assert {total for _, _, total in calls} == {27}


def test_rows_are_sampled_in_chunks_whose_size_follows_from_the_model(monkeypatch):
    assert [sampling.rows_at_once(tiny_llama(), length) for length in (128, 512, 1024)] == [256, 64, 64]
    monkeypatch.setattr(sampling, "_MOST_ROWS", 4)
    monkeypatch.setattr(sampling, "_FEW_TOKENS", 0)
    data = write(samples=10, length=8)
    assert rows_of(data).shape == (10, 8)
    assert len({tuple(r) for r in rows_of(data).tolist()}) == 10
    monkeypatch.setattr(sampling, "_CACHE_BYTES", 1)
    assert sampling.rows_at_once(tiny_llama(), 8) == 1


def test_without_a_tokenizer_a_language_model_still_writes():
    assert rows_of(write(tokenizer=None, samples=2)).shape == (2, 24)


def test_one_token_long_rows():
    assert rows_of(write(length=1)).shape == (6, 1)


def test_nan_logits_are_an_error():
    model = tiny_llama()
    model.lm_head.weight.data[5] = torch.nan
    with pytest.raises(CalibrationError, match="NaN"):
        write(model=model)


def test_sample_tokens_never_draws_what_is_impossible():
    logits = torch.full((4000, 7), -torch.inf)
    logits[:, 2], logits[:, 4] = 0.0, 1.0
    drawn = sample_tokens(logits, torch.Generator().manual_seed(0), 1.0)
    assert set(drawn.tolist()) == {2, 4}
    assert drawn.eq(4).double().mean().item() == pytest.approx(torch.tensor(1.0).sigmoid().item(), abs=0.03)


def test_a_masked_language_model_fills_in_its_own_text():
    model = tiny_bert_mlm()
    data = write(model=model, tokenizer=encoder_tokenizer(), samples=5, length=20)
    rows = rows_of(data)
    assert rows[:, 0].eq(CLS).all() and rows[:, -1].eq(SEP).all()
    inner = rows[:, 1:-1]
    assert not torch.isin(inner, torch.tensor([0, 1, 2, CLS, SEP, MASK])).any()
    assert data.notes == () and "1902.04094" in data.details["method"]
    assert torch.equal(rows, rows_of(write(model=model, tokenizer=encoder_tokenizer(), samples=5, length=20)))
    assert not torch.equal(
        rows, rows_of(write(model=model, tokenizer=encoder_tokenizer(), samples=5, length=20, seed=1))
    )


def test_filled_in_text_follows_what_the_model_prefers():
    model = tiny_bert_mlm()
    model.cls.predictions.bias.data[265] = 20.0
    rows = rows_of(write(model=model, tokenizer=encoder_tokenizer(), samples=5, length=20))
    assert rows[:, 1:-1].eq(265).double().mean() > 0.9


@pytest.mark.parametrize("make", [tiny_bert, lambda: LlamaForSequenceClassification(tiny_llama().config)])
def test_without_a_language_model_head_the_text_is_random_and_says_so(make):
    data = write(model=make(), tokenizer=encoder_tokenizer() if make is tiny_bert else tiny_tokenizer())
    assert "random tokens" in data.description and "calibrate poorly" in data.notes[0]
    assert len(rows_of(data)[:, 1:-1].unique()) > 50


def test_position_tables_with_a_padding_row_limit_the_length():
    model = tiny_roberta_mlm().eval()
    data = write(model=model, tokenizer=encoder_tokenizer(), samples=2, length=512)
    assert rows_of(data).shape == (2, 63)
    assert torch.isfinite(model(**data.batches[0]).logits).all()


def test_a_seq2seq_model_writes_both_sides():
    model = tiny_t5()
    data = write(model=model, samples=5, length=16)
    for batch in data.batches:
        assert batch["input_ids"].shape[1] == 16 and batch["decoder_input_ids"].shape[1] == 4
        assert not batch["input_ids"].eq(0).any() and batch["decoder_input_ids"][:, 0].eq(0).all()
        assert torch.isfinite(model(**batch).logits).all()
    assert torch.equal(rows_of(data), rows_of(write(model=model, samples=5, length=16)))
    assert data.details["method"] == "written by the decoder"


def test_a_half_precision_model_samples_in_its_own_dtype():
    assert rows_of(write(model=tiny_llama().bfloat16(), samples=2)).shape == (2, 24)


def test_a_plain_module_cannot_write():
    with pytest.raises(CalibrationError, match="iterable of model-input dicts"):
        write(model=torch.nn.Linear(2, 2))
