"""The colours of page, pictures and terminal: more colour means that more is kept. Ink is chosen to be read on it."""

from __future__ import annotations

DENSE_LEVEL = 16  # what is kept whole, on the scale of bits
# By bits, light and dark: from the page's own colour towards the ink's, so that what is taken away fades out.
KEPT = {
    "light": {
        2: "#e3eefc",
        3: "#c4dcf8",
        4: "#9cc5f2",
        5: "#73abe8",
        6: "#4b8fdb",
        7: "#2a6cba",
        8: "#1b5396",
        DENSE_LEVEL: "#123a6b",
    },
    "dark": {
        2: "#13253d",
        3: "#17355c",
        4: "#1d4a81",
        5: "#2862a8",
        6: "#5596e0",
        7: "#85b6ee",
        8: "#afd0f6",
        DENSE_LEVEL: "#d8e8fc",
    },
}
# Five steps of damage, the last the largest.
DAMAGE = {
    "light": ("#fdf1e4", "#fadcb8", "#f4b97c", "#e38a3f", "#a84b09"),
    "dark": ("#2b1d10", "#4d2e10", "#82480f", "#d07f2c", "#f6b26b"),
}
BASE = {
    "light": {
        "back": "#ffffff",
        "panel": "#f5f7fa",
        "text": "#1a1f26",
        "soft": "#55606d",
        "line": "#d5dbe2",
        "dense": "#8a94a0",
        "accent": "#1f66b8",
        "other": "#a84b09",
    },
    "dark": {
        "back": "#0e1217",
        "panel": "#171c23",
        "text": "#e7ecf2",
        "soft": "#a3aeba",
        "line": "#323a44",
        "dense": "#7a8591",
        "accent": "#6db0f5",
        "other": "#f0a257",
    },
}
INKS = ("#0d131b", "#ffffff")


def level_of_bits(bits: int | None) -> int:
    """The step of `KEPT` for a weight's bits; None: dense."""
    return DENSE_LEVEL if bits is None or bits > 8 else max(2, bits)


def level_of_share(kept: float) -> int:
    """The step of `KEPT` for the share that is kept of something, 0 to 1."""
    return DENSE_LEVEL if kept >= 1 else 2 + round(6 * max(0.0, kept))


def level_of_damage(part: float) -> int:
    """The step of `DAMAGE` for a damage as a part of the largest, 0 to 1."""
    return min(len(DAMAGE["light"]) - 1, max(0, int(part * len(DAMAGE["light"]))))


def ink_on(colour: str) -> str:
    """Dark or light, whichever reads better on a colour."""
    return max(INKS, key=lambda ink: contrast(ink, colour))


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours as WCAG 2 defines it, 1 to 21; text needs 4.5."""
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    channels = (int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
