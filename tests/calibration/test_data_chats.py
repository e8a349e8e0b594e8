from __future__ import annotations

import copy
import json
from dataclasses import replace

import datasets
import pytest
from tiny import tiny_llama, tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from hf_shrink.calibration.data import calibration_batches
from hf_shrink.calibration.documents import documents
from hf_shrink.calibration.text import document_of
from hf_shrink.errors import CalibrationError
from hf_shrink.recipe import CalibrationSpec

CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def read(source: object, tokenizer: PreTrainedTokenizerFast) -> str:
    """Two windows of 30 tokens, decoded."""
    spec = CalibrationSpec(samples=2, length=30)
    data = calibration_batches(spec, source=source, model=tiny_llama(), tokenizer=tokenizer)
    return tokenizer.decode(data.batches[0]["input_ids"].flatten())


def test_chats_go_through_the_chat_template():
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = CHAT_TEMPLATE
    chat = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Nine."}]
    shared = [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "Nine."}]
    expected = "<s>user: How many?</s><s>assistant: Nine.</s>"
    for dataset in (
        datasets.Dataset.from_dict({"messages": [chat] * 9}),
        datasets.Dataset.from_dict({"conversations": [shared] * 9}),
    ):
        # The template ends with the end token, so no second one is put between two chats.
        assert read(dataset, tokenizer).startswith(expected + expected[:20])


def test_a_prompt_and_its_completion_in_messages_are_one_chat():
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = CHAT_TEMPLATE
    row = {
        "prompt": [{"role": "user", "content": "How many?"}],
        "completion": [{"role": "assistant", "content": "Nine."}],
    }
    found = read(datasets.Dataset.from_list([row] * 9), tokenizer)
    assert found.startswith("<s>user: How many?</s><s>assistant: Nine.</s><s>user")
    with pytest.raises(CalibrationError, match="column 'prompt' holds messages, 'completion' does not"):
        document_of({**row, "completion": "Nine."}, ("prompt", "completion"), tokenizer)


PARTS = [{"type": "text", "text": "How many?"}]
READS_PARTS = "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }};{% endfor %}{% endfor %}"
READS_CALLS = (
    "{% for m in messages %}{% if 'tool_calls' in m %}{% if not m['content'] %}{{ m['tool_calls'][0]['name'] }}"
    "{% endif %}{% else %}{{ m['content'] + ';' }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (None, [{"role": "user", "content": PARTS}, {"role": "assistant", "content": None}], "How many?"),
        (CHAT_TEMPLATE, [{"role": "user", "content": PARTS}], "<s>user: How many?</s>"),
        (CHAT_TEMPLATE, [{"role": "assistant", "content": None}], "<s>assistant: </s>"),
        (READS_PARTS, [{"role": "user", "content": PARTS}], "How many?;"),
        (
            READS_CALLS,
            [
                {"role": "user", "content": "How many?", "tool_calls": None},
                {"role": "assistant", "content": None, "tool_calls": [{"name": "count"}]},
            ],
            "How many?;count",
        ),
        (READS_CALLS, [{"from": "human", "value": PARTS}], "How many?;"),
    ],
)
def test_content_in_parts_and_missing_content_is_read_as_the_template_reads_it(template, messages, expected):
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = template
    found = document_of({"messages": messages}, ("messages",), tokenizer)
    assert (found if isinstance(found, str) else tokenizer.decode(found)) == expected


ALTERNATES = (
    "{% for m in messages %}{% if m['role'] != ['user', 'assistant'][loop.index0 % 2] %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}<s>{{ m['content'] }}</s>{% endfor %}"
)


def test_chats_that_the_template_refuses_are_left_out_and_counted():
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = ALTERNATES
    good = [{"role": "user", "content": "How many stones?"}, {"role": "assistant", "content": "Nine."}]
    bad = [{"role": "system", "content": "Be brief."}, *good]
    spec, model = CalibrationSpec(samples=6, length=16), tiny_llama()
    mixed = datasets.Dataset.from_dict({"messages": [good, bad, good, bad, good] * 3})
    for batches in (2, 400):  # enough text, and less than asked for
        data = calibration_batches(replace(spec, samples=batches), source=mixed, model=model, tokenizer=tokenizer)
        text = tokenizer.decode(data.batches[0]["input_ids"].flatten())
        assert "How many stones?" in text and "Be brief" not in text
    assert "refuses 6 chats of a data set, left out: Conversation roles must alternate" in data.notes[0]
    assert "instead of 400" in data.notes[1]
    for source in (
        datasets.Dataset.from_dict({"messages": [bad] * 4}),
        datasets.Dataset.from_list([{"messages": bad}]),
    ):
        with pytest.raises(CalibrationError, match=r"refuses all \d chats.*Conversation roles must alternate"):
            calibration_batches(spec, source=source, model=model, tokenizer=tokenizer)


def test_texts_to_count_tokens_in_may_hold_chats_that_the_template_refuses(tmp_path):
    tokenizer, refused = copy.deepcopy(tiny_tokenizer()), []
    tokenizer.chat_template = ALTERNATES
    chats = [[{"role": role, "content": "Nine."}] for role in ("user", "system", "user")]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    found = list(documents(str(path), tokenizer, 0, refused))
    assert [tokenizer.decode(ids) for ids in found] == ["<s>Nine.</s>"] * 2
    assert refused == ["Conversation roles must alternate"]
