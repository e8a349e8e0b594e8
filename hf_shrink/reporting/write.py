"""Everything for people that goes into a checkpoint's folder."""

from __future__ import annotations

import json
from pathlib import Path

from hf_shrink.errors import CheckpointError
from hf_shrink.reporting.card import DENSE_CARD, model_card
from hf_shrink.reporting.figures import Record
from hf_shrink.reporting.html import report_html
from hf_shrink.reporting.pictures import write_pictures
from hf_shrink.reporting.plots import MISSING, can_plot
from hf_shrink.reporting.source_card import CARD_NAME, find_source_card


def write_report(
    folder: str | Path, record: Record, *, name: str | None = None, source_card: str | None = None
) -> list[Path]:
    """Write README.md (the model card), report.html and plots/*.png into `folder`; return their paths.

    The dense model's own card goes along whole, as README.dense.md.

    Args:
        folder: of the checkpoint; its config.json, when it is there, tells which class loads it.
        record: source, recipe, plan and report of the run.
        name: of the model, for titles; None: the source's last part and the recipe's name.
        source_card: the dense model's README.md as text. None: what `find_source_card` finds, else what an earlier
            report kept of it.

    Raises:
        CheckpointError: a file cannot be read or written.
    """
    folder = Path(folder)
    try:
        config = folder / "config.json"
        settings = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else None
        if source_card is None:
            source_card = find_source_card(record.source)
        if source_card is None and (folder / DENSE_CARD).is_file():
            source_card = (folder / DENSE_CARD).read_text(encoding="utf-8")
        pictures = write_pictures(folder, record)
        texts = {
            CARD_NAME: model_card(record, config=settings, source_card=source_card, name=name, pictures=pictures),
            "report.html": report_html(record, name=name, remarks=() if can_plot() else (MISSING,)),
        }
        if source_card:
            texts[DENSE_CARD] = source_card
        for path, text in texts.items():
            (folder / path).write_text(text, encoding="utf-8")
        return [*(folder / path for path in texts), *(folder / picture.path for picture in pictures)]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"the report cannot be written to {folder}: {error}") from error
