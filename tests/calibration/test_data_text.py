from __future__ import annotations

import itertools
import json

import datasets
import pandas
import pytest
import torch
from tiny import TEXT, VOCABULARY, tiny_llama, tiny_tokenizer
from tiny_readers import CLS, SEP, encoder_tokenizer, tiny_bert_mlm, tiny_t5, tiny_vit

from hf_shrink.calibration.data import CalibrationData, calibration_batches
from hf_shrink.calibration.text import read_lines
from hf_shrink.errors import CalibrationError
from hf_shrink.recipe import CalibrationSpec, EvaluationSpec


def rows_of(data: CalibrationData) -> torch.Tensor:
    return torch.cat([batch["input_ids"] for batch in data.batches])


def plain_ids(text: str) -> list[int]:
    return tiny_tokenizer()(text, add_special_tokens=False, verbose=False)["input_ids"]


def numbered(count: int) -> list[str]:
    return [f"Row {i} tells of {i * 7 % 13} boats and {i * 11 % 17} gulls." for i in range(count)]


def read(source: object, samples: int = 4, length: int = 16, batch_size: int = 3, **options: object) -> CalibrationData:
    options = {"model": tiny_llama(), "tokenizer": tiny_tokenizer(), **options}
    return calibration_batches(
        CalibrationSpec(samples=samples, length=length, batch_size=batch_size), source=source, **options
    )


def test_a_text_file_gives_its_first_consecutive_windows_in_batches_of_the_spec(tmp_path):
    path = tmp_path / "tide.txt"
    path.write_text(TEXT, encoding="utf-8")
    data = read(str(path), samples=7, length=16, batch_size=3)
    assert rows_of(data).flatten().tolist() == plain_ids(TEXT)[: 7 * 16]
    assert [len(batch["input_ids"]) for batch in data.batches] == [3, 3, 1]
    assert all(batch["attention_mask"].all() for batch in data.batches)
    assert data.tokens == 7 * 16 == data.details["tokens"]
    assert data.description == "7 x 16 tokens of tide.txt"
    assert data.notes == ()


def test_a_long_text_is_tokenised_in_parts_as_if_whole(tmp_path):
    path = tmp_path / "long.txt"
    text = " ".join(numbered(2000))
    path.write_text(text, encoding="utf-8")
    # Two samples of four tokens: the first part read is 256 of about 80,000 characters.
    assert rows_of(read(path, samples=2, length=4)).flatten().tolist() == plain_ids(text)[:8]
    excluded = text[:6000]
    data = read(path, samples=2, length=40, exclude=[excluded])
    assert data.details["dropped_overlap"] > 20
    whole = torch.tensor(plain_ids(text)[: 40 * (data.details["dropped_overlap"] + 2)]).view(-1, 40)
    assert torch.equal(rows_of(data), whole[-2:])


def test_tokenising_a_long_text_prints_no_warning(tmp_path, caplog, capfd):
    path = tmp_path / "long.txt"
    path.write_text(TEXT * 5, encoding="utf-8")
    read(path, samples=40, length=64)
    assert "longer than the specified maximum" not in caplog.text + capfd.readouterr().err


def test_windows_that_overlap_with_excluded_text_are_left_out_and_replaced():
    text = " ".join(numbered(200))
    evaluation = read([text], samples=2, length=32)
    data = read([text], samples=4, length=32, exclude=evaluation.texts(tiny_tokenizer()))
    assert data.details["dropped_overlap"] >= 2
    assert len(rows_of(data)) == 4
    kept = {tuple(row) for row in rows_of(data).tolist()}
    assert kept.isdisjoint(tuple(row) for row in rows_of(evaluation).tolist())


def test_too_little_text_uses_what_is_there_and_says_so(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text(TEXT[:200], encoding="utf-8")
    data = read(path, samples=50, length=16)
    found = len(plain_ids(TEXT[:200]))
    assert len(rows_of(data)) == found // 16
    assert f"has {found} tokens" in data.notes[0] and "instead of 50" in data.notes[0]


def test_less_than_one_window_names_the_tokens_found_and_needed(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("The tide.", encoding="utf-8")
    with pytest.raises(CalibrationError, match=rf"has {len(plain_ids('The tide.'))} tokens.*takes 64"):
        read(path, length=64)


@pytest.mark.parametrize("content", [b"", b"  \n \n", b"\xff\xfe\xff"])
def test_empty_and_undecodable_files_are_errors(tmp_path, content):
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CalibrationError, match=r"empty|UTF-8"):
            read(tmp_path / name)


def test_missing_files_and_other_endings_are_errors(tmp_path):
    with pytest.raises(CalibrationError, match="there is no file"):
        read(str(tmp_path / "none.txt"))
    (tmp_path / "a.csv").write_text("text\nhello")
    with pytest.raises(CalibrationError, match=r"\.jsonl"):
        read(str(tmp_path / "a.csv"))


def test_text_without_a_tokenizer_and_with_the_wrong_one(tmp_path):
    with pytest.raises(CalibrationError, match="tokenizer="):
        read([TEXT], tokenizer=None)
    with pytest.raises(CalibrationError, match=r"vocabulary has 100 entries"):
        read([TEXT], model=tiny_llama(vocab_size=100))


def test_a_vision_model_refuses_text():
    with pytest.raises(CalibrationError, match="ViTModel reads image"):
        read([TEXT], model=tiny_vit())


def test_documents_of_a_list_keep_their_order_with_end_tokens_between():
    documents = ["One two three four.", "Five six seven eight.", "Nine ten."]
    expected: list[int] = []
    for number, document in enumerate(documents):
        expected += ([2] if number else []) + plain_ids(document)
    data = read(documents, samples=50, length=5)
    assert rows_of(data).flatten().tolist() == expected[: len(expected) // 5 * 5]


@pytest.mark.parametrize(
    "make_row",
    [
        lambda text: {"text": text, "id": 3},
        lambda text: {"content": text},
        lambda text: {"prompt": text[:10], "completion": text[10:]},
        lambda text: {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}]},
        lambda text: {"anything": text},
        lambda text: {"input_ids": [*plain_ids(text), 0], "attention_mask": [1] * len(plain_ids(text)) + [0]},
    ],
)
def test_jsonl_parquet_and_data_sets_give_the_same_windows(tmp_path, make_row):
    rows = [make_row(text) for text in numbered(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    dataset = datasets.Dataset.from_list(rows)
    dataset.to_parquet(tmp_path / "rows.parquet")
    results = [rows_of(read(source)) for source in (tmp_path / "rows.jsonl", tmp_path / "rows.parquet", dataset)]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert 0 not in results[0].tolist()[0]  # the padding of input_ids is gone


ITERABLES = {
    "column": lambda texts: datasets.Dataset.from_dict({"text": texts, "other": texts})["text"],
    "column of a stream": lambda texts: datasets.Dataset.from_dict({"text": texts}).to_iterable_dataset()["text"],
    "series": pandas.Series,
    "generator": iter,
    "endless": itertools.cycle,
}


@pytest.mark.parametrize("kind", ITERABLES)
def test_any_iterable_of_texts_reads_as_a_list_does(kind):
    texts = numbered(30)
    data, expected = read(ITERABLES[kind](texts)), read(texts)
    assert torch.equal(rows_of(data), rows_of(expected)) and data.description == expected.description


def test_what_is_no_text_among_texts_is_an_error():
    with pytest.raises(CalibrationError, match=r"all texts or all dicts .* element 2 is a NoneType"):
        read(datasets.Dataset.from_dict({"text": [*numbered(2), None]})["text"])
    with pytest.raises(CalibrationError, match="cannot be a DataFrame"):
        read(pandas.DataFrame({"text": numbered(3)}))


def test_data_sets_are_shuffled_by_the_seed_and_evaluation_reads_other_rows():
    dataset = datasets.Dataset.from_dict({"text": numbered(60)})
    first, again, other = (rows_of(read(dataset, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    evaluation = read(dataset, seed=1, purpose="evaluation")
    rows_seen = [
        {t.split(" tells")[0] for t in tiny_tokenizer().decode(r.flatten()).split("Row ")[1:]}
        for r in (first, rows_of(evaluation))
    ]
    assert rows_seen[0] and rows_seen[1] and rows_seen[0].isdisjoint(rows_seen[1])


def test_json_may_hold_other_ends_of_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one\u2028two\x85three"}\n\n{"text": "four"}\n')
    assert [row["text"] for row in read_lines(path)] == ["one\u2028two\x85three", "four"]


def test_windows_begin_once_where_the_documents_already_have_the_tokenizers_begin_token():
    model, tokenizer = tiny_llama(vocab_size=VOCABULARY + 3), encoder_tokenizer()
    tokenizer.chat_template = "[CLS]{% for m in messages %}{{ m['content'] }}[SEP]{% endfor %}"
    chats = datasets.Dataset.from_list([{"messages": [{"role": "user", "content": TEXT}]}] * 3)
    tokens = datasets.Dataset.from_list([{"input_ids": [CLS, *plain_ids(TEXT), SEP]}] * 3)
    for dataset in (chats, tokens):
        rows = rows_of(read(dataset, model=model, tokenizer=tokenizer, samples=2, length=16))
        assert rows[:, 0].eq(CLS).all()
        assert rows[:, 1:].flatten().tolist() == plain_ids(TEXT)[:30]


@pytest.mark.parametrize("form", ["torch", "numpy"])
def test_token_ids_may_come_as_tensors(form):
    rows = {"input_ids": [[*plain_ids(text), 0] for text in numbered(40)]}
    rows["attention_mask"] = [[1] * (len(row) - 1) + [0] for row in rows["input_ids"]]
    dataset = datasets.Dataset.from_dict(rows)
    assert torch.equal(rows_of(read(dataset.with_format(form))), rows_of(read(dataset)))


def test_broken_rows_are_errors(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n{"text": ')
    with pytest.raises(CalibrationError, match="line 2 is not valid JSON"):
        read(path)
    path.write_text('["fine"]')
    with pytest.raises(CalibrationError, match="line 1 must be an object"):
        read(path)
    path.write_text('{"a": "x", "b": "y"}')
    with pytest.raises(CalibrationError, match="no text column found among a, b"):
        read(path)
    (tmp_path / "bad.parquet").write_bytes(b"not parquet")
    with pytest.raises(CalibrationError, match="cannot read"):
        read(tmp_path / "bad.parquet")


def test_encoder_windows_get_the_tokenizers_special_tokens():
    data = read([TEXT], model=tiny_bert_mlm(), tokenizer=encoder_tokenizer(), samples=3, length=16)
    rows = rows_of(data)
    assert rows.shape == (3, 16)
    assert rows[:, 0].eq(CLS).all() and rows[:, -1].eq(SEP).all()
    assert rows[:, 1:-1].flatten().tolist() == plain_ids(TEXT)[: 3 * 14]


def test_a_causal_model_gets_the_begin_token_that_its_tokenizer_adds_and_no_end_token():
    model = tiny_llama(vocab_size=VOCABULARY + 3)
    rows = rows_of(read([TEXT], model=model, tokenizer=encoder_tokenizer(), samples=3, length=16))
    assert rows[:, 0].eq(CLS).all()
    assert rows[:, 1:].flatten().tolist() == plain_ids(TEXT)[: 3 * 15]


def test_seq2seq_models_get_decoder_text_that_they_can_run():
    model = tiny_t5()
    data = read([TEXT], model=model, samples=4, length=16)
    for batch in data.batches:
        assert batch["decoder_input_ids"].shape == (len(batch["input_ids"]), 4)
        assert batch["decoder_input_ids"][:, 0].eq(0).all()
        assert torch.isfinite(model(**batch).logits).all()
    assert data.tokens == 4 * 16 + 4 * 4


def test_length_is_cut_to_what_the_model_takes_and_said():
    data = read([TEXT * 4], samples=2, length=4000)
    assert rows_of(data).shape == (2, 256)
    assert "at most 256 tokens" in data.notes[0]


def test_evaluation_specs_work_too():
    spec = EvaluationSpec(samples=2, length=16, batch_size=1)
    data = calibration_batches(
        spec, source=[TEXT], model=tiny_llama(), tokenizer=tiny_tokenizer(), purpose="evaluation"
    )
    assert [tuple(b["input_ids"].shape) for b in data.batches] == [(1, 16), (1, 16)]


def test_progress_is_called_up_to_the_total():
    calls: list[tuple[str, int, int]] = []
    read([TEXT], samples=4, progress=lambda *call: calls.append(call))
    assert calls[-1] == ("reading text", 4, 4)
