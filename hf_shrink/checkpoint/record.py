"""What a shrunken checkpoint says about itself: shrink.json."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME

from hf_shrink.errors import CheckpointError, ShrinkError
from hf_shrink.plan import Plan
from hf_shrink.report import ShrinkReport
from hf_shrink.reporting.reproduce import is_hub_id

RECORD_NAME = "shrink.json"
CARD_NAME = "README.md"
_PACKAGES = ("torch", "transformers", "compressed-tensors", "bitsandbytes")


def hf_shrink_version() -> str:
    """The installed version, or "unknown" when run from a source tree that was never installed."""
    return _version("hf_shrink", "unknown")


def current_versions() -> dict[str, str]:
    """Versions of what made a checkpoint, by package name; what is missing (bitsandbytes, say) is said to be so."""
    packages = {name: _version(name, "not installed") for name in _PACKAGES}
    return {"hf_shrink": hf_shrink_version(), **packages, "python": platform.python_version()}


def named(source: str, *, whole: bool = True) -> str:
    """A source as a record has it: a Hub id as it is, a folder so that it cannot be taken for one.

    Args:
        whole: a folder by its whole path, to be found from anywhere; else as it was given, because a Trainer pushes its
            record as it is.
    """
    folder = Path(source).expanduser()
    if not source or not folder.is_dir():
        return source
    if whole:
        return os.path.abspath(folder)
    return source if source[0] in "./~" else f"./{source}"


def source_of(model: nn.Module) -> str:
    """Where a model in memory comes from, as a record has it: what it was loaded from, else its class.

    A name without an owner is a Hub id only where it was fetched: a folder that is no longer there has such a name too.
    """
    name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    if not name:
        return f"./{type(model).__name__}"
    fetched = is_hub_id(name) and isinstance(try_to_load_from_cache(name, CONFIG_NAME), str)
    return named(name, whole=False) if fetched or "/" in name or Path(name).is_dir() else f"./{name}"


def _version(package: str, otherwise: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return otherwise


@dataclass
class ShrinkRecord:
    """How a model became what it is; travels with it as `model.shrink_record` and as shrink.json.

    Attributes:
        source: folder or Hub id of the dense model, see `named` and `source_of`.
        recipe: the recipe as decoded YAML (`Recipe.to_dict`).
        plan: what was done.
        report: what came of it.
        versions: of the packages that made it.
        card: text of the model card (README.md); None when there is none. Not part of shrink.json.
        tokenizer: the one that was rewritten with the model's vocabulary, saved beside the model; None where it is the
            source's. Not part of shrink.json.
    """

    source: str
    recipe: dict[str, Any]
    plan: Plan
    report: ShrinkReport
    versions: dict[str, str] = field(default_factory=current_versions)
    card: str | None = None
    tokenizer: PreTrainedTokenizerBase | None = None

    def to_dict(self) -> dict[str, Any]:
        """The content of shrink.json."""
        return {
            "hf_shrink_version": self.versions.get("hf_shrink", "unknown"),
            "source": self.source,
            "recipe": self.recipe,
            "plan": json.loads(self.plan.to_json()),
            "report": self.report.to_dict(),
            "versions": self.versions,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], card: str | None = None) -> ShrinkRecord:
        """A record from the content of shrink.json. Raises CheckpointError when it is not one."""
        try:
            return cls(
                source=str(data["source"]),
                recipe=dict(data["recipe"]),
                plan=Plan.from_json(data["plan"]),
                report=ShrinkReport.from_dict(dict(data["report"])),
                versions=dict(data["versions"]),
                card=card,
            )
        except (KeyError, TypeError, ValueError, AttributeError, ShrinkError) as error:
            raise CheckpointError(
                f"{RECORD_NAME} is not a record of this version of hf_shrink ({error}); the model itself is not "
                f"affected: delete the file, or load it with the version that wrote it"
            ) from error

    def write(self, folder: Path) -> None:
        """Write shrink.json, README.md when there is a card, and the tokenizer when it is new, into `folder`."""
        (folder / RECORD_NAME).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        if self.card is not None:
            (folder / CARD_NAME).write_text(self.card, encoding="utf-8")


def read_record(path: Path) -> ShrinkRecord:
    """The record in a shrink.json, with the model card beside it. Raises CheckpointError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; delete it if the model itself is fine") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {type(data).__name__}, not a record; delete it if the model is fine")
    card = path.with_name(CARD_NAME)
    return ShrinkRecord.from_dict(data, card.read_text(encoding="utf-8") if card.is_file() else None)
