"""`trainer.push_to_hub()` after `ShrinkCallback`: whose card goes up."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import yaml
from from_scripts import load_script
from hub.server import Server
from huggingface_hub import HfApi, ModelCard
from tiny import TEXT, tiny_llama, tiny_tokenizer
from training.test_example import ACCURACY
from training.trained import language, trainer, width
from transformers import LlamaForSequenceClassification, TrainerCallback

from hf_shrink import ShrinkCallback
from hf_shrink.training.card import joined
from hf_shrink.training.state import STATE_NAME


def trained(folder: Path, callbacks: list[Any], attach: ShrinkCallback | None = None) -> Any:
    run = trainer(tiny_llama(num_hidden_layers=2), language, folder, callbacks, hub_model_id="me/trained")
    if attach is not None:
        attach.attach(run)
    run.train()
    return run


def test_an_attached_trainer_keeps_our_sections_and_metadata(hub: Server, tmp_path: Path) -> None:
    run = trained(tmp_path / "out", [], ShrinkCallback(width()))
    for _ in range(2):  # the second card is no longer than the first
        run.push_to_hub(tags=["mine"])
        card = ModelCard(hub.hub.repositories["me/trained"].files()["README.md"].decode())
        assert {"hf_shrink", "pruned", "mine"} <= set(card.data.tags)
        for section in ("## Training procedure", "## How it was made smaller", "## How to load it", "## Limits"):
            assert card.text.count(f"\n{section}\n") == 1
        assert '"me/trained"' in card.text
    assert {"model.safetensors", "shrink.json"} <= hub.hub.repositories["me/trained"].files().keys()


def test_without_attach_one_line_says_what_to_call(
    hub: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained(tmp_path / "out", [ShrinkCallback(width())]).push_to_hub()
    assert caplog.text.count("ShrinkCallback.attach(trainer)") == 1
    assert "made smaller" not in ModelCard(hub.hub.repositories["me/trained"].files()["README.md"].decode()).text


def test_a_checkpoint_that_goes_up_has_the_state(hub: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 4

    seen: dict[str, set[str]] = {}

    def upload(self: HfApi, *, folder_path: str, path_in_repo: str = "", **rest: Any) -> Future[None]:
        seen[path_in_repo] = {path.name for path in Path(folder_path).iterdir()}
        done: Future[None] = Future()
        done.set_result(None)
        return done

    monkeypatch.setattr(HfApi, "upload_folder", upload)
    settings = {"push_to_hub": True, "hub_strategy": "all_checkpoints", "save_strategy": "steps", "save_steps": 2}
    callbacks = [ShrinkCallback(width()), Stop()]
    folder, model = tmp_path / "out", tiny_llama(num_hidden_layers=1)
    run = trainer(model, language, folder, callbacks, hub_model_id="me/trained", **settings)
    run.train()
    assert all(STATE_NAME in seen[f"checkpoint-{step}"] for step in (2, 4))
    state = folder / "checkpoint-4" / STATE_NAME
    state.unlink()
    run.push_to_hub()
    assert not state.exists() and "" in seen


@pytest.mark.parametrize("name", ["train_causal_lm.py", "train_text_classification.py"])
def test_the_example_scripts_push_once_with_our_card(name: str, hub: Server, tmp_path: Path) -> None:
    classes = name == "train_text_classification.py"
    dense = tiny_llama(num_hidden_layers=1, pad_token_id=0)
    kind = LlamaForSequenceClassification(dense.config) if classes else dense
    kind.save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    files = [tmp_path / f"{part}.{'csv' if classes else 'txt'}" for part in ("train", "validation")]
    for file in files:
        file.write_text("text,label\n" + "the tide goes out,t\na child counts stones,b\n" * 8 if classes else TEXT)
    (tmp_path / "own_accuracy.py").write_text(ACCURACY)
    settings = {
        "model_name_or_path": tmp_path / "dense",
        "train_file": files[0],
        "validation_file": files[1],
        "output_dir": tmp_path / "out",
        "max_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "push_to_hub": True,
        "hub_model_id": "me/example",
        **({"metrics": tmp_path / "own_accuracy.py"} if classes else {"block_size": 16}),
    }
    load_script(name).main([str(word) for key, value in settings.items() for word in (f"--{key}", value)])
    repository = hub.hub.repositories["me/example"]
    assert [commit.message for commit in repository.branches["main"][1:]] == ["Model save"]
    assert "## How it was made smaller" in repository.files()["README.md"].decode()


def test_joined_cards_have_the_results_and_tags_of_both() -> None:
    def card(name: str, tag: str, metric: float, **more: str) -> str:
        results = [{"task": {"type": "text"}, "metrics": [{"type": "loss", "value": metric}]}]
        data = {"tags": [tag], "model-index": [{"name": name, "results": results}], **more}
        return f"---\n{yaml.safe_dump(data)}---\n\n# {name}\n\nWords of {name}.\n"

    theirs, ours = (
        card("theirs", "trainer", 1.0, license="mit"),
        card("ours", "small", 2.0, base_model_relation="merge"),
    )
    text = joined(theirs, ours)
    data = yaml.safe_load(text.split("---\n")[1])
    assert data["tags"] == ["small", "trainer"]
    (index,) = data["model-index"]
    assert index["name"] == "theirs"
    assert [result["metrics"][0]["value"] for result in index["results"]] == [1.0, 2.0]
    assert (data["license"], data["base_model_relation"]) == ("mit", "merge")
    assert text.endswith("Words of theirs.\n\n## How it was made smaller\n\nWords of ours.\n")
    assert joined(theirs, text) == text
