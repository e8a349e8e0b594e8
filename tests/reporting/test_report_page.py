"""report.html, parsed: it needs nothing from outside, is well formed, and shows what was measured."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from reporting.record_example import ROLES, bare_record, full_record

from hf_shrink.reporting import report_html

VOID = {"meta", "link", "img", "br", "hr", "input"}
LOADING = {"src", "srcset", "href", "xlink:href", "action", "data", "poster"}


class Page(HTMLParser):
    """Collects tags and text, and fails on tags that do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.mark.parametrize("record", [full_record(), bare_record()], ids=["full", "bare"])
def test_nothing_is_loaded_from_outside(record):
    html = report_html(record)
    page = Page(html)
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed")
        for name in LOADING & set(attributes):
            assert str(attributes[name]).startswith(("#", "data:")), (tag, attributes)
    assert "url(" not in html and "@import" not in html and "http" not in html


def test_every_picture_has_a_text():
    page = Page(report_html(full_record()))
    pictures = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(pictures) == 3
    for attributes in pictures:
        assert attributes["role"] == "img" and len(attributes["aria-label"]) > 20
    assert any("480 kB" in p["aria-label"] and "120 kB" in p["aria-label"] for p in pictures)


def test_dark_and_narrow_screens_are_thought_of():
    html = report_html(full_record())
    assert "prefers-color-scheme: dark" in html
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in Page(html).tags


def test_figures_and_user_text_are_shown_as_they_are():
    html = report_html(full_record(), remarks=["no plots"])
    text = Page(html).text
    for expected in ("13 [11.7, 14.3]", "4.00x smaller", "1.50x", "-16.7%", "8,176", "<b>note & more</b>", "no plots"):
        assert expected in text
    assert "The <tide>" in text and "<tide>" not in html


def test_bit_map_has_a_cell_a_weight():
    html = report_html(full_record())
    cells = re.findall(r'<text class="cell"[^>]*>([^<]*)</text>', html)
    assert len(cells) == 4 * len(ROLES) and cells.count("-") == 1
    # Rows are roles in their order, columns blocks: block b, role i has (3, 4, 8)[(b + i) % 3] bits.
    assert cells[:4] == ["3", "4", "8", "3"] and cells[8:] == ["8", "3", "-", "8"]
    assert "lm_head" in Page(html).text


def test_bars_are_in_proportion():
    html = report_html(full_record())
    widths = [float(w) for w in re.findall(r'<rect class="bar\d" x="100" y="\d+" width="([\d.]+)"', html)]
    assert widths[0] / widths[1] == pytest.approx(4, rel=1e-3)
    heights = [float(h) for h in re.findall(r'<rect class="bar1"[^>]*height="([\d.]+)">', html)]
    assert [h / heights[0] for h in heights] == pytest.approx([1, 2, 3, 4], rel=1e-2)


def test_a_bare_record_says_that_nothing_was_measured():
    text = Page(report_html(bare_record())).text
    assert "quality of this model was not measured" in text
    assert "blocks of <unequal> width" in text
    assert "Bits" not in text and "Error by block" not in text
