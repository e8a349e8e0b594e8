"""A headless Chromium that looks at pages, where there is one; what it asks of a page is written in JavaScript here."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# As root in a container there is no sandbox; the rest keeps it from looking for hosts that cannot be reached.
ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")


def chromium() -> str:
    """Its path; the test is skipped where there is none, and fails where HF_SHRINK_BROWSER says that there must be."""
    asked = os.environ.get("HF_SHRINK_BROWSER", "")
    found = shutil.which(asked) if asked and asked != "required" else next(filter(None, map(shutil.which, NAMES)), None)
    if found is None and asked:
        pytest.fail(f"HF_SHRINK_BROWSER is {asked!r}, and there is no such browser; NO PAGE WAS LOOKED AT")
    if found is None:
        pytest.skip("NO PAGE WAS LOOKED AT: no Chromium here; apt-get install chromium, or set HF_SHRINK_BROWSER")
    return found


@contextmanager
def launched() -> Iterator[Any]:
    """A running browser."""
    api = pytest.importorskip("playwright.sync_api", reason="NO PAGE WAS LOOKED AT: pip install playwright")
    path = chromium()
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        yield browser
        browser.close()


@contextmanager
def opened(browser: Any, file: Path, width: int, scheme: str) -> Iterator[Any]:
    """A page with that file; `page.complaints` collects what went to the console and what was asked of a network."""
    context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
    page = context.new_page()
    page.complaints = []
    page.on("console", lambda said: page.complaints.append(f"console {said.type}: {said.text}"))
    page.on("pageerror", lambda error: page.complaints.append(f"error: {error}"))
    page.on("request", lambda asked: page.complaints.append(asked.url) if _outside(asked.url, file) else None)
    page.goto(file.as_uri())
    folder = os.environ.get("HF_SHRINK_SCREENSHOTS")
    if folder:
        page.screenshot(path=Path(folder) / f"{file.stem}-{width}-{scheme}.png", full_page=True)
    yield page
    context.close()


def _outside(url: str, file: Path) -> bool:
    return url != file.as_uri() and not url.startswith("data:")


# How far the page is wider than the window, px.
OVERFLOW = "document.scrollingElement.scrollWidth - document.documentElement.clientWidth"

# Texts that are hard to read: WCAG 2 contrast below 4.5, or 3 where they are large.
PALE = """() => {
  const channel = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const found = numbers(getComputedStyle(e).backgroundColor);
      if (found.length < 4 || found[3] === 1) return found;
    }
    return [255, 255, 255];
  };
  const pale = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    const box = element.getBoundingClientRect();
    if (!own || !box.width || element.tagName === "title") continue;
    const style = getComputedStyle(element);
    const svg = element instanceof SVGElement;
    const pair = [numbers(svg ? style.fill : style.color), behind(svg ? element.ownerSVGElement : element)];
    const [low, high] = pair.map(luminance).sort((a, b) => a - b);
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    const contrast = (high + 0.05) / (low + 0.05);
    if (contrast < (large ? 3 : 4.5)) pale.push(`${element.textContent.slice(0, 40)} ${contrast.toFixed(2)}`);
  }
  return pale;
}"""

# Pictures without a description.
NAMELESS = """[...document.querySelectorAll("svg, img, [role=img]")]
  .filter(e => !(e.getAttribute("alt") || e.getAttribute("aria-label") || "").trim()).map(e => e.outerHTML)"""

# What can have the focus, in the order of the document.
FOCUSABLE = """[...document.querySelectorAll("a[href], summary, [tabindex='0']")]
  .filter(e => !e.parentElement.closest("details:not([open])") || e.tagName === "SUMMARY")
  .map(e => e.outerHTML.slice(0, 120))"""
FOCUSED = "document.activeElement === document.body ? null : document.activeElement.outerHTML.slice(0, 120)"
