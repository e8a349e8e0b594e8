"""report.html, parsed: it needs nothing from outside, is well formed, and shows what was measured."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from reporting.record_example import MLP_ROLES, ROLES, bare_record, full_record, searched_record

from hf_shrink.reporting import report_html
from hf_shrink.reporting.charts import LEFT, Axis
from hf_shrink.reporting.palette import DAMAGE, KEPT, contrast, ink_on

GONE = ("gone", "\N{MULTIPLICATION SIGN}")
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


@pytest.mark.parametrize("record", [searched_record(), bare_record()], ids=["full", "bare"])
def test_nothing_is_loaded_from_outside(record):
    html = report_html(record)
    page = Page(html)
    for tag, attributes in page.tags:
        assert tag not in ("script", "iframe", "object", "embed")
        for name in LOADING & set(attributes):
            assert str(attributes[name]).startswith(("#", "data:")), (tag, attributes)
    assert "url(" not in html and "@import" not in html and "http:" not in html and "https:" not in html


def test_every_picture_has_a_text_and_its_numbers_as_a_table():
    page = Page(report_html(searched_record()))
    pictures = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(pictures) == 3
    for attributes in pictures:
        assert attributes["role"] == "img" and len(attributes["aria-label"]) > 20
    for numbers in ("Relative squared error by block", "Nats by block", "Points of the sweep"):
        assert numbers in page.text
    assert "model.layers.2 0.03" in page.text


def test_every_ink_can_be_read_on_its_colour():
    for scale in (*KEPT.values(), *(dict(enumerate(steps)) for steps in DAMAGE.values())):
        for colour in scale.values():
            assert contrast(ink_on(colour), colour) >= 4.5, colour
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


def test_figures_and_user_text_are_shown_as_they_are():
    html = report_html(full_record(), remarks=["no plots"])
    text = Page(html).text
    for expected in (
        "13 [11.7, 14.3]",
        "4.00x smaller",
        "1.50x",
        "-16.7%",
        "+8.3%",
        "Excess loss - 0.08 [0.072, 0.088]",
        "8,176",
        "<b>note & more</b>",
        "no plots",
    ):
        assert expected in text
    assert "(it ends at once)" in text and "The <tide>" in text and "<tide>" not in html


def test_the_headline_has_size_speed_and_quality():
    text = Page(report_html(full_record())).text
    said = "120 kB from 480 kB (4.00x smaller), decoding 1.50x as fast, perplexity 13 from 12"
    assert f"Made from owner/tiny-llama : {said}." in text
    assert "Size 120 kB dense 480 kB 4.00x smaller" in text
    assert "Perplexity 13 dense 12 excess loss 0.08 nats KL divergence 0.08 95%: 0.072 to 0.088" in text


def test_the_map_has_a_cell_for_every_role_and_block():
    html = report_html(full_record())
    lines = {
        name: re.findall(r'<td class="(\w+)" title="[^"]*">(?:<span[^>]*>\w+</span><span[^>]*>)?([^<]*)', cells)
        for name, cells in re.findall(r'<tr><th scope="row">([^<]*)</th>((?:<td class="\w+" title.*?)+)</tr>', html)
    }
    assert list(lines) == [*ROLES, *MLP_ROLES, "KV groups", "query heads", "channels, %", "predicted KL, 1e-4"]
    # Role i of block b has (3, 4, 8)[(b + i) % 3] bits.
    assert lines["query"] == [("k3", "3"), ("k4", "4"), ("k8", "8"), GONE]
    assert lines["down"] == [("k4", "4"), GONE, ("k16", ""), GONE]
    assert lines["query heads"] == [("k6", "4"), ("k16", "6"), ("k16", "6"), GONE]
    assert lines["channels, %"] == [("k6", "67"), GONE, ("k16", "100"), GONE]
    assert [text for _, text in lines["predicted KL, 1e-4"]] == ["20", "40", "60", "80"]
    assert "lm_head: 8 bits" in Page(html).text


def test_bars_are_in_proportion():
    html = report_html(full_record())
    widths = [float(w) for w in re.findall(r'<i style="width:([\d.]+)%">', html)]
    assert widths[0] / widths[1] == pytest.approx(4, rel=1e-3)
    heights = [float(h) for h in re.findall(r'<rect class="main"[^>]*height="([\d.]+)">', html)]
    assert [h / heights[0] for h in heights] == pytest.approx([1, 2, 3], rel=1e-2)


def test_axes():
    linear, logarithmic = Axis.linear(0.03), Axis.logarithmic(3e-4, 0.5)
    assert linear.ticks == pytest.approx((0, 0.01, 0.02, 0.03)) and linear.place(0.015) == pytest.approx(0.5)
    assert Axis.linear(0.0).ticks[0] == 0 and Axis.linear(269).ticks == (0, 100, 200, 300)
    assert logarithmic.ticks == pytest.approx((1e-4, 1e-3, 1e-2, 0.1, 1))
    assert logarithmic.place(1e-2) == pytest.approx(0.5)


def test_a_sweep_is_shown_with_the_plan_that_was_taken():
    html = report_html(searched_record())
    assert html.count('class="ring"') == 1 and "This model&#x27;s plan is that of 30%" in html
    svg = ElementTree.fromstring(re.search(r'<svg role="img" aria-label="KL divergence.*?</svg>', html)[0])
    dots = {
        e.find("title").text: float(e.get("cx").rstrip("%")) for e in svg.iter("circle") if e.find("title") is not None
    }
    assert len(dots) == 4
    (dense,), (small,) = ([x for tip, x in dots.items() if tip.startswith(name)] for name in ("dense", "22%"))
    assert (dense - LEFT) / (small - LEFT) == pytest.approx(269 / 59, rel=1e-2)


def test_it_says_how_to_get_it_again_and_gives_no_path_away():
    record = full_record("/home/someone/models/dense")
    record.recipe["calibration"]["data"] = "/home/someone/texts/shore.txt"
    text = Page(report_html(record)).text
    assert "hf-shrink run dense --recipe shrink.json --seed 3 --output again" in text
    assert "/home/someone" not in text and "shore.txt" in text
    assert "torch 2.13.0" in text and "1 thread," in text and "128 x 512 tokens that the model wrote" in text
    assert "4 min 24 s" in text


def test_a_bare_record_says_that_nothing_was_measured():
    text = Page(report_html(bare_record())).text
    assert "quality of this model was not measured" in text
    assert "blocks of <unequal> width" in text
    assert "How far" not in text and "What both models write" not in text and "smaller" not in text
