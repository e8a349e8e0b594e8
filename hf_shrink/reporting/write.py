"""Everything for people that goes into a checkpoint's folder."""

from __future__ import annotations

import json
from pathlib import Path

from hf_shrink.errors import CheckpointError
from hf_shrink.reporting.card import model_card
from hf_shrink.reporting.figures import Record
from hf_shrink.reporting.html import report_html
from hf_shrink.reporting.plots import MISSING, can_plot, write_plots


def write_report(
    folder: str | Path, record: Record, *, name: str | None = None, source_card: str | None = None
) -> list[Path]:
    """Write README.md (the model card), report.html and plots/*.png into `folder`; return their paths.

    Args:
        folder: of the checkpoint; its config.json, when it is there, tells which class loads it.
        record: source, recipe, plan and report of the run.
        name: of the model, for titles; None: the source's last part and the recipe's name.
        source_card: the dense model's README.md as text. None: read from the source where that is a folder with one.

    Raises:
        CheckpointError: a file cannot be read or written.
    """
    folder = Path(folder)
    try:
        config = folder / "config.json"
        settings = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else None
        given = Path(record.source) / "README.md"
        if source_card is None and given.is_file():
            source_card = given.read_text(encoding="utf-8")
        card = model_card(record, config=settings, source_card=source_card, name=name)
        page = report_html(record, name=name, remarks=() if can_plot() else (MISSING,))
        paths = [folder / "README.md", folder / "report.html"]
        for path, text in zip(paths, (card, page), strict=True):
            path.write_text(text, encoding="utf-8")
        return paths + write_plots(folder, record)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"the report cannot be written to {folder}: {error}") from error
