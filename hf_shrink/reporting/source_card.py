"""What a compressed model's card takes over from the dense model's: metadata that still holds, and what its authors say
of use, limits and terms."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.repocard import REGEX_YAML_BLOCK, RepoCard

from hf_shrink.reporting.reproduce import is_hub_id

CARD_NAME = "README.md"

# Metadata that is as true of the compressed model as of its source; so are all keys that begin with `extra_gated_`.
INHERITED = ("license", "license_name", "license_link", "language", "language_bcp47", "pipeline_tag", "datasets")
# Tags that say how the dense weights are stored, or that the Hub makes itself.
_STORED = re.compile(
    r"(.*\d[- ]?bit|fp\d+|bf16|int\d+|gguf|gptq|awq|mlx|onnx|openvino|safetensors|pytorch|tf|jax|exl\d|bnb|quantized"
    r"|transformers(\.js)?|endpoints_compatible|text-generation-inference|.*:.*)",
    re.IGNORECASE,
)
_CARRIED = re.compile(
    r"\b(limit\w*|bias\w*|risks?|intended|(direct|downstream|acceptable|recommended|prohibited) uses?|use cases?|misuse"
    r"|out[- ]of[- ]scope( use)?|ethic\w*|safety|responsib\w*|licen[sc]e|terms|citation|cite|languages?|caveats?"
    r"|disclaimer|warnings?|training data|recommendations)\b",
    re.IGNORECASE,
)
_HEADING = re.compile(r"(#{1,6})\s+(.+?)\s*#*")
_FENCE = re.compile(r"\s*(`{3,}|~{3,})")
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(\s*<?([^)\s>]+)>?[^)]*\)")
_WHOLE = re.compile(r"([a-z][a-z0-9+.-]*:|//|#)", re.IGNORECASE)  # a link that leads there from anywhere
_UNFILLED = "[more information needed]"


@dataclass(frozen=True)
class Section:
    """A heading with its level (1 to 6) and the text below it, up to the next heading."""

    level: int
    title: str
    text: str


@dataclass(frozen=True)
class SourceCard:
    """A dense model's card.

    Attributes:
        metadata: its front matter; empty where there is none, or where it cannot be read.
        sections: those that the compressed model's card takes over, sections below them included, in order.
    """

    metadata: dict[str, Any] = field(default_factory=dict)
    sections: tuple[Section, ...] = ()

    @classmethod
    def of(cls, text: str | None) -> SourceCard:
        """From a README.md; of a broken one what can be read, because a finished run is not worth failing for it."""
        if not text:
            return cls()
        found = REGEX_YAML_BLOCK.search(text)
        return cls(_metadata(text), tuple(_carried(text[found.end() :] if found else text)))

    @property
    def inherited(self) -> dict[str, Any]:
        """Metadata that still holds."""
        gated = [key for key in self.metadata if key.startswith("extra_gated_")]
        return {key: self.metadata[key] for key in (*INHERITED, *gated) if self.metadata.get(key) is not None}

    @property
    def tags(self) -> list[str]:
        """Tags that say what the model is for, not how it was stored."""
        tags = self.metadata.get("tags") or []
        return [str(tag) for tag in tags if not _STORED.fullmatch(str(tag))] if isinstance(tags, list) else []

    def markdown(self, hub_id: str | None, depth: int) -> str:
        """The sections with their headings at `depth` and below; links that lead to files beside the dense model's card
        lead to the Hub, or are left out where it is not there."""
        lines, tops = [], [0]
        for section in self.sections:
            while tops[-1] >= section.level:
                tops.pop()
            tops.append(section.level)
            lines.append(f"{'#' * min(6, depth + len(tops) - 2)} {section.title}")
            lines.append(_LINK.sub(lambda link: _linked(link, hub_id), section.text))
        return "\n\n".join(line for line in lines if line)


def find_source_card(source: str) -> str | None:
    """The card of a dense model in a folder, or of one that was fetched from the Hub before; None where there is none.

    Args:
        source: folder or Hub id.
    """
    place = try_to_load_from_cache(source, CARD_NAME) if is_hub_id(source) else Path(source) / CARD_NAME
    if not isinstance(place, str | Path) or not Path(place).is_file():  # not fetched, or known not to be there
        return None
    return Path(place).read_text(encoding="utf-8", errors="replace")


def _metadata(text: str) -> dict[str, Any]:
    try:
        return dict(vars(RepoCard(text, ignore_metadata_errors=True).data))
    except (ValueError, yaml.YAMLError):
        return {}


def _carried(body: str) -> Iterator[Section]:
    """Sections whose heading speaks of use, limits or terms, with everything below them."""
    inside: int | None = None
    for section in _sections(_COMMENT.sub("", body)):
        if inside is not None and section.level <= inside:
            inside = None
        if inside is None and _CARRIED.search(section.title):
            inside = section.level
        if inside is not None and section.text.strip().lower() != _UNFILLED:
            yield section


def _sections(body: str) -> Iterator[Section]:
    """The body cut at its headings; what stands before the first is left out. Lines inside of code are no headings."""
    level, title, lines = 0, "", []
    fence: str | None = None
    for line in body.splitlines():
        mark = _FENCE.match(line)
        if mark and fence is None:
            fence = mark[1]
        elif mark and fence is not None and mark[1].startswith(fence):
            fence = None
        heading = _HEADING.fullmatch(line) if fence is None else None
        if heading is None:
            lines.append(line)
            continue
        if level:
            yield Section(level, title, "\n".join(lines).strip())
        level, title, lines = len(heading[1]), heading[2], []
    if level:
        yield Section(level, title, "\n".join(lines).strip())


def _linked(link: re.Match[str], hub_id: str | None) -> str:
    picture, words, target = link.groups()
    if _WHOLE.match(target):
        return link[0]
    return (
        words if hub_id is None else f"{picture}[{words}]({on_hub(target, hub_id, 'resolve' if picture else 'blob')})"
    )


def on_hub(link: str, hub_id: str, kind: str = "blob") -> str:
    """Where a link that a card of the Hub holds leads to; whole ones stay as they are."""
    return link if _WHOLE.match(link) else f"https://huggingface.co/{hub_id}/{kind}/main/{link.removeprefix('./')}"
