"""The card: what the Hub reads of it, and that it claims nothing without a figure."""

from __future__ import annotations

import json
import sys

import pytest
from huggingface_hub import ModelCard, metadata_load
from reporting.record_example import bare_record, full_record

from hf_shrink.errors import CheckpointError
from hf_shrink.reporting import model_card, write_report
from hf_shrink.reporting.plots import MISSING

SOURCE_CARD = "---\nlicense: apache-2.0\nlanguage:\n- en\ntags:\n- chat\n---\n# Dense\n"
LLAMA = {"architectures": ["LlamaForCausalLM"]}


def test_metadata_loads_and_is_complete(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(model_card(full_record(), config=LLAMA, source_card=SOURCE_CARD))
    data = metadata_load(path)
    assert data["base_model"] == "owner/tiny-llama" and data["base_model_relation"] == "quantized"
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"
    assert data["license"] == "apache-2.0" and data["language"] == ["en"]
    assert data["tags"] == ["hf_shrink", "quantized", "compressed-tensors", "3-bit", "4-bit", "8-bit", "pruned"]
    results = ModelCard.load(path).data.eval_results
    values = {result.metric_type: result.metric_value for result in results}
    assert values == {"perplexity": 13.0, "kl_divergence": 0.08, "top1_agreement": 0.9}
    assert {result.dataset_name for result in results} == {"16 x 512 tokens of shore.txt"}


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


def test_no_claim_without_a_figure():
    text = model_card(bare_record())
    assert "was not measured" in text and "No figure of quality exists" in text and "Speed was not measured" in text
    assert "smaller" not in text and "model-index" not in text and "Perplexity" not in text


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (LLAMA, "AutoModelForCausalLM.from_pretrained("),
        ({"architectures": ["BertForMaskedLM"]}, "AutoModelForMaskedLM.from_pretrained("),
        ({"architectures": ["ViTForImageClassification"]}, "AutoModelForImageClassification.from_pretrained("),
        ({"architectures": ["T5ForConditionalGeneration"]}, "AutoModelForSeq2SeqLM.from_pretrained("),
        ({"architectures": ["WhisperForConditionalGeneration"]}, "AutoModelForSpeechSeq2Seq.from_pretrained("),
        ({"architectures": ["BertModel"]}, "= AutoModel.from_pretrained("),
        (None, "AutoModelForCausalLM.from_pretrained("),  # from the task that the evaluation measured
    ],
)
def test_the_class_that_loads_it(config, line):
    text = model_card(full_record(), config=config)
    assert line in text and "import hf_shrink" not in text


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
    paths = write_report(folder, full_record(str(source)), name="small")
    names = [str(path.relative_to(folder)) for path in paths]
    assert names == [
        "README.md",
        "report.html",
        "plots/size.png",
        "plots/block_errors.png",
        "plots/bits_model_layers.png",
    ]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in paths[2:])
    assert metadata_load(paths[0])["license"] == "apache-2.0"
    again = {path: path.read_bytes() for path in paths}
    write_report(folder, full_record(str(source)), name="small")
    assert again == {path: path.read_bytes() for path in paths}, "the same run gives the same files"


def test_without_matplotlib_the_report_says_so(tmp_path, monkeypatch):
    # find_spec raises nothing and finds nothing when the module is set to None under its name.
    monkeypatch.setattr("hf_shrink.reporting.plots.importlib.util.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    paths = write_report(tmp_path, full_record())
    assert [path.name for path in paths] == ["README.md", "report.html"]
    page = paths[1].read_text()
    assert MISSING.split("(")[0].strip() in page and page.count("<svg") == 3


def test_an_unwritable_folder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="missing"):
        write_report(tmp_path / "missing", full_record())
