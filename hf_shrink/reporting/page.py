"""What our pages are made of: one file that needs nothing else, and parts that keyboards and screen readers can use."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from string import Template

from hf_shrink.reporting.style import STYLE

# The policy makes the browser itself keep the page from the network; there are no scripts at all.
_PAGE = Template(
    """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>$title</title>
<style>$style</style>
</head>
<body>
<a class="skip" href="#content">Skip to the figures</a>
<header>
<p class="kind">$kind</p>
<h1>$heading</h1>
$lede
</header>
$contents
<main id="content">
$body
</main>
<footer>$footer</footer>
</body>
</html>
"""
)


def page(
    kind: str, heading: str, lede: str, sections: Iterable[tuple[str, str, str]], footer: str = "Made by hf_shrink."
) -> str:
    """A whole page.

    Args:
        kind: what it is, such as "Compression report".
        heading: the title, as text.
        lede: HTML below it.
        sections: (title as text, short name for the list of contents, HTML); those without HTML are left out.
        footer: as text.
    """
    there = [(title, short, html) for title, short, html in sections if html]
    links = "".join(f'<li><a href="#{_slug(short)}">{escape(short)}</a></li>' for _, short, _ in there)
    body = "\n".join(
        f'<section id="{_slug(short)}" aria-labelledby="{_slug(short)}-title">\n'
        f'<h2 id="{_slug(short)}-title">{escape(title)}</h2>\n{html}\n</section>'
        for title, short, html in there
    )
    return _PAGE.substitute(
        title=escape(f"{heading}: {kind.lower()}"),
        style=STYLE,
        kind=escape(kind),
        heading=escape(heading),
        lede=lede,
        contents=f'<nav aria-label="Contents"><ul>{links}</ul></nav>' if len(there) > 1 else "",
        body=body,
        footer=escape(footer),
    )


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text."""
    return f"<p{_class(kind)}>{escape(text)}</p>"


def bullets(lines: Iterable[str]) -> str:
    """A list of plain texts."""
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def scrolling(html: str, label: str, kind: str = "") -> str:
    """A part that scrolls on its own where it is too wide, by keyboard too; `label` says what it is."""
    kinds = f"scroll {kind}".strip()
    return f'<div class="{kinds}" role="region" tabindex="0" aria-label="{escape(label)}">{html}</div>'


def table(
    caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]], *, html: bool = False, kind: str = ""
) -> str:
    """A table whose first column names the rows. Cells are text, or HTML where `html`."""
    shown = (lambda cell: cell) if html else escape
    top = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    lines = "".join(
        f'<tr><th scope="row">{shown(first)}</th>{"".join(f"<td>{shown(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    return (
        f"<table{_class(kind)}><caption>{escape(caption)}</caption><thead><tr>{top}</tr></thead>"
        f"<tbody>{lines}</tbody></table>"
    )


def folded(summary: str, html: str) -> str:
    """Something that is there for who opens it."""
    return f"<details><summary>{escape(summary)}</summary>{html}</details>"


def figure(caption: str, html: str, numbers: str = "") -> str:
    """A picture with its caption, and the numbers behind it as a table that can be opened."""
    more = folded("The same as a table", scrolling(numbers, caption, "tall")) if numbers else ""
    return f"<figure><figcaption>{escape(caption)}</figcaption>{html}{more}</figure>"


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """What colours mean: (class of the colour, words)."""
    items = "".join(f'<li><i class="{kind}" aria-hidden="true"></i>{escape(words)}</li>' for kind, words in entries)
    return f'<ul class="legend">{items}</ul>'


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text.lower())
