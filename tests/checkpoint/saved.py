"""Save every row once, and see once what stock transformers makes of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from checkpoint.rows import IDS, ROWS
from stock import Stock
from torch import Tensor
from transformers import PreTrainedModel

from hf_shrink.checkpoint.save import model_portability
from hf_shrink.runtime.optimizing import restore_layout, use_kernels


@dataclass(frozen=True)
class Saved:
    """A row's checkpoint, the logits of the model that wrote it, and the stock outcome (None without a stock run)."""

    folder: Path
    kind: str
    logits: Tensor
    reasons: tuple[str, ...]
    stock_logits: Tensor | None = None
    stock_error: str | None = None

    def config(self) -> dict:
        return json.loads((self.folder / "config.json").read_text())

    def groups(self) -> list[dict]:
        return list(self.config().get("quantization_config", {}).get("config_groups", {}).values())


def logits_of(model: PreTrainedModel) -> Tensor:
    """Of the weights as they are stored: fast kernels round inputs, so they are left out meanwhile."""
    ids = torch.tensor(IDS)
    extra = {"decoder_input_ids": ids} if getattr(model.config, "is_encoder_decoder", False) else {}
    optimized = any(getattr(module, "kernel", None) is not None for module in model.modules())
    restore_layout(model)
    with torch.no_grad():
        logits = model(ids, **extra)[0]
    if optimized:
        use_kernels(model)
    return logits


def save_rows(root: Path) -> dict[str, Saved]:
    saved = {}
    for name, row in ROWS.items():
        model = row.build()
        logits, reasons = logits_of(model), tuple(model_portability(model))
        folder = root / name.replace(" ", "_").replace(",", "")
        model.save_pretrained(folder)
        saved[name] = Saved(folder, type(model).__name__, logits, reasons)
    return saved


def run_stock(saved: dict[str, Saved], stock: Stock) -> dict[str, Saved]:
    stock.run([{"folder": str(item.folder), "class": item.kind, "ids": IDS} for item in saved.values()])
    outcome = {}
    for name, item in saved.items():
        logits, error = item.folder / "stock.pt", item.folder / "stock.txt"
        outcome[name] = Saved(
            item.folder,
            item.kind,
            item.logits,
            item.reasons,
            torch.load(logits) if logits.is_file() else None,
            error.read_text() if error.is_file() else None,
        )
    return outcome
