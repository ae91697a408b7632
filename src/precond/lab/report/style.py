"""One look for all figures: colors of the entrants, and axes that fit into the page's text."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

# Distinct for most kinds of color vision (after Okabe & Ito, 2008), dark enough for thin lines on white.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#c2549d", "#d99a00", "#4aa8d8", "#6b4fa0", "#7a7f87", "#8c564b", "#1f2933")
_DASHES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (1.5, 1.5)))

_INK, _GRAY, _RULE = "#1f2933", "#616e7c", "#e4e7eb"
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "font.size": 10,
    "axes.edgecolor": "#9aa5b1",
    "axes.labelcolor": _GRAY,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _RULE,
    "grid.linewidth": 0.8,
    "text.color": _INK,
    "xtick.color": _GRAY,
    "ytick.color": _GRAY,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Pen:
    """Color and dashes of one entrant, the same in every figure and in the legend."""

    color: str
    dashes: Any

    @property
    def css(self) -> str:
        """Style of the border that stands for the line in HTML."""
        return "solid" if self.dashes == "solid" else "dashed" if self.dashes == _DASHES[1] else "dotted"


def pen(index: int) -> Pen:
    """Of the entrant at a place in the list."""
    return Pen(_COLORS[index % len(_COLORS)], _DASHES[index // len(_COLORS) % len(_DASHES)])


def svg(draw: Any, name: str, size: tuple[float, float] = (4.6, 3.0)) -> str:
    """An SVG element made by a function that draws on axes.

    Args:
        draw: called with :class:`matplotlib.axes.Axes`.
        name: of the figure; two figures on one page need two names, because ids are made of it.
        size: in inches.

    Returns:
        The element, without prologue and metadata, scaling with its container.
    """
    return svg_panels(lambda panels: draw(panels[0]), name, size, 1)


def svg_panels(
    draw: Callable[[Sequence[Axes]], None], name: str, size: tuple[float, float], panels: int, background: str = "none"
) -> str:
    """The same with several axes side by side, which share the ordinate.

    Args:
        draw: called with the axes, from left to right.
        name, size: as in :func:`svg`.
        panels: how many.
        background: a color for a picture that stands on pages of another color, dark ones too.
    """
    with mpl.rc_context({**_SETTINGS, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots(1, panels, sharey=True, squeeze=False)[0])
        for axes in figure.axes:
            axes.patch.set_visible(False)
        file = io.StringIO()
        figure.savefig(file, format="svg", facecolor=background, metadata={"Date": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    # Ids of groups (figure_1, axes_1, …) are not salted and would repeat over the page; nothing refers to them.
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    return re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2).replace("<svg", '<svg role="img"', 1)


def log_axis(axis: Any) -> None:
    """A logarithmic axis with numbers at 1, and where there is room for more also at 2 and 5, in each decade; within one, at equal distances."""
    low, high = sorted(axis.get_view_interval())
    decades = math.log10(high / low) if low > 0 else math.inf
    within = MaxNLocator(4, steps=(1, 2, 5, 10))
    axis.set_major_locator(within if decades < 0.8 else LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2.5 else (1.0,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}" if 1e-4 <= abs(x) < 1e5 else f"{x:.2g}"))
    axis.set_minor_formatter(NullFormatter())


def thousands(axes: Axes) -> None:
    """An axis of counts, which are whole: 12k for 12,000."""
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=(1, 2, 2.5, 5, 10)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1000:g}k" if abs(x) >= 10_000 else f"{x:,g}"))


# On dark pages a file of its own is dark, as a whole: it is read by itself wherever the two disagree.
_DARK = {"#ffffff": "#131416", _INK: "#e4e7eb", _GRAY: "#9aa5b1", _RULE: "#323f4b"}
_WHERE_DARK = "".join(
    f'[style*="{what}: {light}"]{{{what}: {dark} !important}}' for light, dark in _DARK.items() for what in ("fill", "stroke")
)


def svg_file(element: str) -> str:
    """An SVG element as a file of its own, dark where the reader's pages are."""
    element = element.replace("</style>", f"@media (prefers-color-scheme: dark){{{_WHERE_DARK}}}</style>", 1)
    spaced = element if "xmlns=" in element else element.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{spaced}\n'
