"""Theme: figures in colours that the page's style sheet decides, so that one picture serves light and dark.

Matplotlib writes colours as hex numbers; each role has a number of its own that is replaced by a CSS variable afterwards.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROLES = ("ink", "muted", "grid", "ours", "peer", "other", "limit", "paper", *(f"series{n}" for n in range(1, 7)))
COLOURS = {role: f"#0{number:x}0{number:x}0{number:x}" for number, role in enumerate(ROLES, start=1)}
_LIGHT = {
    **{"paper": "#ffffff", "ink": "#1c2126", "muted": "#6b747d", "grid": "#e3e6e8", "ours": "#0b6bcb", "peer": "#c5cbd0"},
    **{"other": "#e6e9ec", "limit": "#c2410c", "series1": "#0b6bcb", "series2": "#c2410c", "series3": "#2f855a"},
    **{"series4": "#8b3fb5", "series5": "#9a7b00", "series6": "#0e7c86"},
}
WIDTH = 4.0
"""Inches; at 72 units per inch somewhat less than a phone's width, so that text is a little larger there than stated here."""
_FONT = 8.5

_SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dsa",
    "font.size": _FONT,
    "axes.edgecolor": COLOURS["muted"],
    "axes.labelcolor": COLOURS["ink"],
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": COLOURS["grid"],
    "grid.linewidth": 0.6,
    "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "xtick.labelcolor": COLOURS["ink"],
    "ytick.labelcolor": COLOURS["ink"],
    "legend.frameon": False,
    "legend.fontsize": _FONT,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
}


def drawn(draw: Callable[[], Figure], name: str, title: str) -> str:
    """The figure as inline SVG.

    Args:
        name: unique on the page; identifiers inside the picture begin with it.
        title: what a screen reader says.
    """
    with matplotlib.rc_context(_SETTINGS):
        figure = draw()
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, bbox_inches="tight", pad_inches=0.03, metadata={"Date": None})
        plt.close(figure)
    return _themed(text.getvalue(), name, title)


def standalone(picture: str) -> str:
    """An inline picture as a file of its own, in the page's light colours."""
    style = "".join(f"--{role}:{colour};" for role, colour in _LIGHT.items())
    head = picture.replace("<svg", f'<svg style="background:{_LIGHT["paper"]};{style}font-family:sans-serif"', 1)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{head}'


def _themed(svg: str, name: str, title: str) -> str:
    svg = svg[svg.index("<svg") :]
    for role, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{role})")
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"font:([^;\"]*?)'DejaVu Sans'[^;\"]*", r"font:\1inherit", svg)
    svg = re.sub(r"font-family: ?[^;\"]*", "font-family: inherit", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
