"""The model card that a Trainer writes, with what it would leave out: that the model was made smaller, and how."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml
from transformers import Trainer

from hf_shrink.checkpoint.record import CARD_NAME, RECORD_NAME, read_record
from hf_shrink.checkpoint.staging import named_in_card
from hf_shrink.reporting.figures import display_name

HEADING = "## How it was made smaller"


def keep_card(trainer: Trainer) -> None:
    """Let every model card that this trainer writes say what its model's own card says. Once is enough."""
    if not isinstance(trainer.create_model_card, KeptCard):
        vars(trainer)["create_model_card"] = KeptCard(trainer)


class KeptCard:
    """`create_model_card` of one trainer."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.create = trainer.create_model_card

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """As the trainer's own, with its arguments. `save_model` has put the model's own card into the folder."""
        folder = Path(str(self.trainer.args.output_dir))
        card, record = folder / CARD_NAME, folder / RECORD_NAME
        first = self.trainer.is_world_process_zero() and card.is_file() and record.is_file()
        own = card.read_text(encoding="utf-8") if first else None
        self.create(*args, **kwargs)
        if own is None:
            return
        repo_id = getattr(self.trainer, "hub_model_id", None)
        if repo_id is not None:
            own = named_in_card(own, (folder.name, display_name(read_record(record))), repo_id)
        whole = card.with_name(f".{CARD_NAME}.partial")
        whole.write_text(joined(card.read_text(encoding="utf-8"), own), encoding="utf-8")
        os.replace(whole, card)


def joined(theirs: str, own: str) -> str:
    """A Trainer's card with the sections and the metadata of the compressed model's own.

    Args:
        theirs: the card that a Trainer wrote.
        own: the model's, or a card that was joined before.
    """
    known, text = _parts(theirs)
    said, sections = _parts(own)
    data = {**said, **known, "tags": list(dict.fromkeys([*said.get("tags", ()), *known.get("tags", ())]))}
    if said.get("model-index"):
        data["model-index"] = _with_results(known.get("model-index") or [], said["model-index"])
    # Without its title, or only what was joined before.
    sections = re.sub(r"\A\s*# .*\n", "", sections).split(f"{HEADING}\n", 1)[-1]
    front = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n{text.rstrip()}\n\n{HEADING}\n\n{sections.strip()}\n"


def _parts(card: str) -> tuple[dict[str, Any], str]:
    """The metadata and the text of a card."""
    found = re.match(r"---\n(.*?)\n---\n(.*)", card, flags=re.DOTALL)
    return (yaml.safe_load(found[1]) or {}, found[2]) if found else ({}, card)


def _with_results(known: list[dict[str, Any]], said: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results of both under the name of the first."""
    results = [result for entry in (*known, *said) for result in entry.get("results", ())]
    return [{"name": (known or said)[0]["name"], "results": [r for i, r in enumerate(results) if r not in results[:i]]}]
