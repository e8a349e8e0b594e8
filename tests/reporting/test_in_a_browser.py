"""Our pages in a real browser: nothing complains or is wider than a phone, and all can be read and reached."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from reporting.browser import FOCUSABLE, FOCUSED, NAMELESS, OVERFLOW, PALE, launched, opened
from reporting.record_example import bare_record, front, full_record, searched_record

from hf_shrink.reporting import report_html
from hf_shrink.reporting.front_chart import front_html

PHONE, DESKTOP = 390, 1280


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    texts = {
        "searched": report_html(searched_record(blocks=30)),
        "bare": report_html(bare_record()),
        "front": front_html(front(full_record(blocks=30).plan, blocks=30)),
    }
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in texts}


@pytest.mark.parametrize("name", ["searched", "bare", "front"])
def test_it_is_quiet_readable_and_no_wider_than_the_window(browser: Any, pages: dict[str, Path], name: str) -> None:
    for width, scheme in ((PHONE, "light"), (PHONE, "dark"), (DESKTOP, "light"), (DESKTOP, "dark")):
        with opened(browser, pages[name], width, scheme) as page:
            page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
            assert page.evaluate(OVERFLOW) <= 0, (width, scheme)
            assert page.evaluate(PALE) == [], (width, scheme)
            assert page.evaluate(NAMELESS) == []
            assert page.complaints == []


def test_the_checks_of_a_page_can_fail(browser: Any, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text(
        '<body><p style="width:2000px;color:#999;background:#fff">pale</p><svg></svg>'
        '<img alt=" " src="https://nowhere.invalid/x.png"><script>console.error("heard")</script></body>'
    )
    with opened(browser, bad, PHONE, "light") as page:
        assert page.evaluate(OVERFLOW) > 0
        assert page.evaluate(PALE) == ["pale 2.85"]
        assert len(page.evaluate(NAMELESS)) == 2
        assert any("heard" in said for said in page.complaints)
        assert "https://nowhere.invalid/x.png" in page.complaints


def test_dark_mode_is_dark(browser: Any, pages: dict[str, Path]) -> None:
    colours = {}
    for scheme in ("light", "dark"):
        with opened(browser, pages["searched"], PHONE, scheme) as page:
            colours[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert colours == {"light": "rgb(255, 255, 255)", "dark": "rgb(14, 18, 23)"}


def test_the_keyboard_reaches_everything_in_order(browser: Any, pages: dict[str, Path]) -> None:
    with opened(browser, pages["searched"], PHONE, "light") as page:
        expected, found = page.evaluate(FOCUSABLE), []
        page.keyboard.press("Tab")
        assert page.locator(".skip").bounding_box()["x"] >= 0, "the link past the list of contents shows when focused"
        while (now := page.evaluate(FOCUSED)) is not None and len(found) <= len(expected):
            found.append(now)
            page.keyboard.press("Tab")
        assert found == expected
        assert sum("scroll" in html for html in found) >= 2
        # What scrolls sideways does so by key.
        region = page.get_by_role("region", name="What is kept of the 30 blocks")
        region.focus()
        page.keyboard.press("ArrowRight")
        page.wait_for_timeout(300)
        assert page.evaluate("document.activeElement.scrollLeft") > 0


def test_a_screen_reader_hears_landmarks_captions_and_descriptions(browser: Any, pages: dict[str, Path]) -> None:
    with opened(browser, pages["searched"], DESKTOP, "light") as page:
        heard = page.locator("body").aria_snapshot()
        for landmark in ("banner", 'navigation "Contents"', "main", "contentinfo", 'region "Result"'):
            assert f"- {landmark}" in heard, landmark
        for table in ("Dense beside compressed", "What is kept of the 30 blocks of decoder: a column for each block."):
            assert f'table "{table}"' in heard
        assert 'rowheader "query"' in heard and 'columnheader "29"' in heard
        assert 'cell "out"' in heard, "a dropped block is not read out as a sign"
        assert heard.count("- img") == 3
        levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map(h => +h.tagName[1])")
        assert levels[0] == 1 and levels.count(1) == 1
        assert all(later - earlier <= 1 for earlier, later in pairwise(levels))
        assert page.evaluate("[...document.querySelectorAll('table')].every(t => t.caption)")
        assert page.evaluate("[...document.querySelectorAll('th')].every(h => h.scope)")
