"""The card: what the Hub reads of it, and that it claims nothing without a figure."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace

import pytest
import torch
from huggingface_hub import ModelCard, metadata_load
from reporting.record_example import bare_record, full_record, searched_record
from tiny import tiny_llama

from hf_shrink.checkpoint.record import source_of
from hf_shrink.errors import CheckpointError
from hf_shrink.reporting import model_card, write_report
from hf_shrink.reporting.html import report_html
from hf_shrink.reporting.plots import MISSING
from hf_shrink.reporting.reproduce import TRAINED, is_hub_id, no_command
from hf_shrink.reporting.source_card import find_source_card

SOURCE_CARD = """---
license: other
license_name: shore-1.0
license_link: LICENSE.md
language:
- en
tags:
- chat
- gguf
- 4-bit
- license:other
extra_gated_prompt: Say who you are.
model-index:
- name: dense
  results: []
---
# Dense
The best there is.

## Evaluation
It scores 99%.

## Intended use
For [walks](docs/walks.md) on the shore. ![map](map.png) See [the sea](https://example.org/sea).

```python
# Limits are no heading here
```

### Out of the question
Swimming.

<!-- a template's remark -->
## Bias, Risks, and Limitations ##
It has never seen a mountain.

## License
[More Information Needed]

## How to load
Not like ours.
"""
LLAMA = {"architectures": ["LlamaForCausalLM"]}


def test_metadata_loads_and_is_complete(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(model_card(full_record(), config=LLAMA, source_card=SOURCE_CARD))
    data = metadata_load(path)
    assert data["base_model"] == "owner/tiny-llama" and data["base_model_relation"] == "quantized"
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"
    assert (data["license"], data["license_name"]) == ("other", "shore-1.0")
    assert data["license_link"] == "https://huggingface.co/owner/tiny-llama/blob/main/LICENSE.md"
    assert data["language"] == ["en"] and data["extra_gated_prompt"] == "Say who you are."
    assert data["tags"] == ["hf_shrink", "quantized", "compressed-tensors", "3-bit", "4-bit", "8-bit", "pruned", "chat"]
    results = ModelCard.load(path).data.eval_results
    values = {result.metric_type: result.metric_value for result in results}
    assert values == {"perplexity": 13.0, "kl_divergence": 0.08, "top1_agreement": 0.9, "made_up_metric": 0.5}
    assert {result.dataset_name for result in results} == {"16 x 512 tokens of shore.txt"}
    assert results[0].metric_name == "Perplexity (95% interval 11.7 to 14.3)"
    assert results[0].metric_args == {"confidence_level": 0.95, "low": 11.7, "high": 14.3}
    assert results[0].dataset_args == {"tokens": 8176, "sequences": 16, "context": 512}
    assert results[3].metric_name == "Made up metric" and results[3].metric_args is None


@pytest.mark.parametrize("record", [full_record(), searched_record(), bare_record()], ids=["full", "searched", "bare"])
def test_the_hubs_own_validation_takes_it(record, monkeypatch):
    card = ModelCard(model_card(record, config=LLAMA, source_card=SOURCE_CARD))  # raises where metadata is not valid
    again = ModelCard(str(card))
    assert again.data.to_dict() == card.data.to_dict()
    assert again.text == card.text
    asked = []

    class Session:
        """Takes what `validate` would send."""

        def post(self, url, json, headers):
            asked.append(json)

    monkeypatch.setattr("huggingface_hub.repocard.get_session", Session)
    monkeypatch.setattr("huggingface_hub.repocard.hf_raise_for_status", lambda response: None)
    card.validate()
    assert asked == [{"repoType": "model", "content": str(card)}]


def test_what_the_dense_models_authors_say_is_taken_over():
    text = model_card(full_record(), config=LLAMA, source_card=SOURCE_CARD)
    carried = text.split("## From the dense model's card")[1]
    assert "### Intended use" in carried and "#### Out of the question\n\nSwimming." in carried
    assert "### Bias, Risks, and Limitations\n\nIt has never seen a mountain." in carried
    assert "[walks](https://huggingface.co/owner/tiny-llama/blob/main/docs/walks.md)" in carried
    assert "![map](https://huggingface.co/owner/tiny-llama/resolve/main/map.png)" in carried
    assert "[the sea](https://example.org/sea)" in carried and "# Limits are no heading here" in carried
    for left_out in ("best there is", "99%", "Not like ours", "remark", "### License", "### Limits"):
        assert left_out not in carried
    local = model_card(full_record("/models/dense"), source_card=SOURCE_CARD)
    assert "For walks on the shore. map See [the sea](https://example.org/sea)." in local


def test_a_local_model_made_from_one_of_the_hub_names_that():
    card = "---\nbase_model: owner/root\n---\n"
    data = ModelCard(model_card(full_record("/models/dense"), source_card=card)).data
    assert (data["base_model"], data["base_model_relation"]) == ("owner/root", "finetune")


def test_a_local_source_is_no_base_model_and_its_path_stays_private():
    card = ModelCard(model_card(bare_record()))
    assert not {"base_model", "base_model_relation", "license"} & set(card.data.to_dict())
    assert "license was not found" in card.text
    assert "/somewhere" not in str(card) and "dense-model" in card.text


def test_a_pruned_hub_model_is_a_finetune():
    record = bare_record()
    record.source = "owner/dense"
    data = ModelCard(model_card(record)).data
    assert (data["base_model"], data["base_model_relation"]) == ("owner/dense", "finetune")


def test_the_oldest_models_of_the_hub_have_no_owner(tmp_path, monkeypatch):
    record = bare_record()
    record.source = "gpt2"
    card = ModelCard(model_card(record, source_card=SOURCE_CARD))
    assert (card.data.base_model, card.data.base_model_relation) == ("gpt2", "finetune")
    assert "[gpt2](https://huggingface.co/gpt2), compressed" in card.text
    assert "[walks](https://huggingface.co/gpt2/blob/main/docs/walks.md)" in card.text
    fetched(tmp_path, monkeypatch, "gpt2")
    (tmp_path / "gpt2").mkdir()  # which is not what was fetched
    (tmp_path / "gpt2" / "README.md").write_text("another")
    monkeypatch.chdir(tmp_path)
    assert find_source_card("gpt2") == SOURCE_CARD


def test_a_model_in_memory_is_named_by_where_it_is_from(tmp_path, monkeypatch):
    model, folder = tiny_llama(), tmp_path / "dense"
    record = bare_record()
    record.source = source_of(model)
    card = ModelCard(model_card(record))
    assert "base_model" not in card.data.to_dict() and "A local model (`LlamaForCausalLM`)" in card.text
    assert not is_hub_id(source_of(torch.nn.Linear(2, 2)))
    model.save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    model = type(model).from_pretrained("dense")
    assert source_of(model) == "./dense"
    monkeypatch.chdir(folder)
    assert source_of(model) == "./dense" and not is_hub_id("./dense")
    fetched(tmp_path / "cache", monkeypatch, "dense")
    assert source_of(model) == "dense" and is_hub_id("dense")


def test_no_claim_without_a_figure():
    text = model_card(bare_record())
    assert "was not measured" in text and "No figure of quality exists" in text and "Speed was not measured" in text
    assert "smaller" not in text and "model-index" not in text and "Perplexity" not in text


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (LLAMA, "AutoModelForCausalLM.from_pretrained(name)"),
        ({"architectures": ["BertForMaskedLM"]}, "AutoModelForMaskedLM.from_pretrained(name)"),
        ({"architectures": ["ViTForImageClassification"]}, "AutoModelForImageClassification.from_pretrained(name)"),
        ({"architectures": ["T5ForConditionalGeneration"]}, "AutoModelForSeq2SeqLM.from_pretrained(name)"),
        ({"architectures": ["WhisperForConditionalGeneration"]}, "AutoModelForSpeechSeq2Seq.from_pretrained(name)"),
        ({"architectures": ["BertModel"]}, "= AutoModel.from_pretrained(name)"),
        (None, "AutoModelForCausalLM.from_pretrained(name)"),  # from the task that the evaluation measured
    ],
)
def test_the_class_that_loads_it(config, line):
    text = model_card(full_record(), config=config)
    assert line in text and "import hf_shrink" not in text.split("```python")[1].split("```")[0]


def test_not_portable_says_how_and_why():
    text = model_card(bare_record(), config=LLAMA)
    code = text.split("```python")[1].split("```")[0]
    assert code.index("import hf_shrink") < code.index("from_pretrained")
    assert "blocks of <unequal> width" in text


def test_backticks_in_a_completion_do_not_end_its_block():
    assert "````text\n```goes``` & comes\n````" in model_card(full_record())


@pytest.mark.parametrize("source_card", ["no front matter", "---\n: : broken: [\n---\n", "---\nmodel-index: 3\n---\n"])
def test_a_broken_source_card_is_no_reason_to_fail(source_card):
    assert ModelCard(model_card(full_record(), source_card=source_card)).data.library_name == "transformers"


def test_write_report_writes_everything(tmp_path):
    source, folder = tmp_path / "dense", tmp_path / "small"
    source.mkdir(), folder.mkdir()
    (source / "README.md").write_text(SOURCE_CARD)
    (folder / "config.json").write_text(json.dumps(LLAMA))
    record = replace(searched_record(), source=str(source))
    paths = write_report(folder, record, name="small")
    names = [str(path.relative_to(folder)) for path in paths]
    assert names == [
        "README.md",
        "report.html",
        "README.dense.md",
        "plots/size.png",
        "plots/plan.png",
        "plots/block_errors.png",
        "plots/sensitivity.png",
        "plots/front.png",
    ]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in paths[3:])
    assert metadata_load(paths[0])["license"] == "other"
    shown = re.findall(r"!\[(.+)\]\((.+)\)", paths[0].read_text())
    assert [path for _, path in shown if path.startswith("plots/")] == [
        "plots/size.png",
        "plots/front.png",
        "plots/plan.png",
        "plots/sensitivity.png",
        "plots/block_errors.png",
    ]
    assert all(len(text) > 20 for text, path in shown if path.startswith("plots/"))
    again = {path: path.read_bytes() for path in paths}
    (source / "README.md").unlink()  # as where the source is elsewhere by now: the card kept what it said
    write_report(folder, record, name="small")
    assert again == {path: path.read_bytes() for path in paths}, "the same run gives the same files"


def fetched(cache, monkeypatch, name):
    """A cache of the Hub that holds a model's config and card."""
    folder = cache / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("0" * 40)
    for path, text in (
        (folder / "refs" / "main", "0" * 40),
        (snapshot / "README.md", SOURCE_CARD),
        (snapshot / "config.json", "{}"),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))


def test_the_card_of_a_model_of_the_hub_is_found_where_it_was_fetched_before(tmp_path, monkeypatch):
    fetched(tmp_path, monkeypatch, "owner/tiny-llama")
    assert find_source_card("owner/tiny-llama") == SOURCE_CARD
    assert find_source_card("owner/never-fetched") is None
    assert find_source_card(str(tmp_path / "nowhere")) is None


def test_what_was_made_in_training_claims_no_command_that_does_it_again():
    record = full_record()
    assert "hf-shrink run owner/tiny-llama" in model_card(record) and TRAINED not in model_card(record)
    record.report.trained = True
    assert "hf-shrink run" not in model_card(record) and TRAINED in model_card(record)


def test_what_no_command_does_again_says_what_it_takes():
    record = full_record()
    record.report.recoveries = [{"minutes": 15, "rank": 8, "data": "/secret/notes.txt", "seed": 2}]
    card, page = model_card(record), report_html(record)
    again = "--output again --overwrite --data notes.txt --minutes 15 --rank 8 --seed 2"
    for text in (card, page):
        assert f"hf-shrink recover again --baseline owner/tiny-llama {again}" in text and "/secret" not in text
    record.report.recoveries[0]["rounding"] = True
    assert "hf-shrink run" not in model_card(record) and "rounding" in no_command(record)
    record.report.recoveries = [{"steps": 5, "data": None, "seed": 0}]
    assert "hf-shrink run" not in report_html(record) and "`recover` with that data" in model_card(record)
    record.report.recoveries, record.report.calibration["object"] = [], True
    assert "hf-shrink run" not in model_card(record) and "handed over in Python" in report_html(record)


def test_an_adapter_belongs_to_how_it_is_loaded():
    record = full_record()
    assert record.report.portable
    record.report.adapter = True
    for config in (LLAMA, {"architectures": ["BertModel"]}):
        card = model_card(record, config=config)
        assert 'model = hf_shrink.load_adapter(model, name, subfolder="adapter")' in card
        assert "import hf_shrink  # puts" in card and "hf_shrink is not needed" not in card
    assert "with the adapter in" in report_html(record)


def test_without_matplotlib_the_report_says_so(tmp_path, monkeypatch):
    # find_spec raises nothing and finds nothing when the module is set to None under its name.
    monkeypatch.setattr("hf_shrink.reporting.plots.importlib.util.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    paths = write_report(tmp_path, full_record())
    assert [path.name for path in paths] == ["README.md", "report.html"]
    page = paths[1].read_text()
    assert MISSING.split("(")[0].strip() in page and page.count("<svg") == 2


def test_an_unwritable_folder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="missing"):
        write_report(tmp_path / "missing", full_record())
