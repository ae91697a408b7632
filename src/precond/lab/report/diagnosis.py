"""A diagnosis as one self-contained page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullLocator

from precond.analysis.diagnostics import Diagnosis, Layer
from precond.analysis.diagnostics.calibrated import calibration
from precond.analysis.diagnostics.diagnosis import LABELS
from precond.analysis.diagnostics.layer import block_texts
from precond.analysis.diagnostics.numbers import number
from precond.analysis.diagnostics.text import cut
from precond.analysis.diagnostics.trying import Tried
from precond.lab.report.rendering import render_template
from precond.lab.report.style import Pen, log_axis, pen, svg, thousands
from precond.lab.workloads import write_atomically

_ORDER = ("raw", "centered", "scaled", "bnp", "whitened", "optimizer")
_SHOWN = ("raw", "optimizer", "bnp", "whitened")  # in the picture: as it is, and with each remedy
_SPECTRA = ("raw", "bnp", "whitened", "optimizer")
_FIRST = 6  # items and layers on the first screen
_FIGURES = 12  # layers with figures of their own: those with the largest κ
_MEANINGS = {
    "raw": "as they are",
    "centered": "h − μ",
    "scaled": "h/σ",
    "bnp": "centered and scaled (BNP)",
    "whitened": "whitened, damped",
    "optimizer": "with the optimizer's P",
}
_REMEDIES = {"standardize": "Standardized data", "bnp": "BNP", "whitened": "Whitening"}


@dataclass(frozen=True)
class Row:
    """κ of a layer in several coordinates, as dots on a line.

    Attributes:
        name: of the layer.
        dots: color, place on the axis in percent, and what it is.
        span: first and last place in percent.
        text: κ now and with the remedy that makes it smallest.
    """

    name: str
    dots: tuple[tuple[str, float, str], ...]
    span: tuple[float, float]
    text: str


def render_diagnosis(
    found: Diagnosis, title: str, facts: dict[str, str], command: str = "", tried: Sequence[Tried] = ()
) -> str:
    """The page, with styles and figures inside and nothing loaded from elsewhere; all text is escaped.

    Args:
        found: what to show.
        title: of the page.
        facts: what it is about and how it was made, by name.
        command: that made it, or nothing.
        tried: remedies that were.
    """
    columns = [name for name in _ORDER if name in found.columns]
    pictured = [name for name in _SHOWN if name in found.columns]
    shown = found.worst[:_FIGURES]
    end = _end(found.layers, pictured)
    return render_template(
        "diagnosis.html",
        title=title,
        command=command,
        facts=facts,
        found=found,
        verdict=found.verdict,
        advice=found.advice[:_FIRST],
        more=found.advice[_FIRST:],
        considered=[(_REMEDIES[c.name], c) for c in found.considered if c.why],
        right=calibration().sentence if any(c.gain.known for c in found.considered) else "",
        steps=calibration().steps,
        columns=[LABELS.get(name, name) for name in columns],
        rows=[(layer, _cells(layer, columns)) for layer in found.layers],
        legend=[(_MEANINGS[name], _pen(name)) for name in pictured],
        worst=[_row(layer, pictured, end) for layer in found.worst[:_FIRST]],
        other=[_row(layer, pictured, end) for layer in found.worst[_FIRST:]],
        ticks=_ticks(end),
        tried=list(tried),
        curves=Markup(_curves(tried)) if sum(t.curve is not None for t in tried) else None,
        curve_legend=[(t.label, pen(i)) for i, t in enumerate(tried) if t.curve is not None],
        spectra=[(layer.name, Markup(_spectrum(layer, i))) for i, layer in enumerate(shown)],
        spectra_legend=[(_MEANINGS[name], _pen(name)) for name in _SPECTRA if name in columns],
        drivers=Markup(_drivers(shown)) if found.layers else None,
        heat=[(layer.name, Markup(_heat(layer, i))) for i, layer in enumerate(shown) if layer.correlation.shape[0] > 1],
        blocks=[(layer.name, block_texts(layer)) for layer in found.layers] if found.matrix != "none" else [],
        matrix="Hessian" if found.matrix == "hessian" else "Gauss–Newton matrix",
        left_out=len(found.layers) - len(shown),
    )


def save_diagnosis(
    path: Path, found: Diagnosis, title: str, facts: dict[str, str], command: str = "", tried: Sequence[Tried] = ()
) -> None:
    """Write the page.

    Raises:
        WriteError: where it cannot be written.
    """
    write_atomically(path, render_diagnosis(found, title, facts, command, tried))


def _finite(x: float) -> float:
    return x if math.isfinite(x) else 0.0


def _pen(name: str) -> Pen:
    return pen(_ORDER.index(name))


def _cells(layer: Layer, columns: Sequence[str]) -> list[str]:
    return [number(layer.spectra.kappa(name)) for name in columns]


def _end(layers: Sequence[Layer], columns: Sequence[str]) -> int:
    """Decades of the axis."""
    largest = max((_finite(layer.spectra.kappa(name)) for layer in layers for name in columns), default=10.0)
    return max(1, math.ceil(math.log10(max(largest, 1.0))))


def _ticks(end: int) -> list[tuple[float, str]]:
    """Places in percent and labels of the axis, four at most: beside long names there is no room for more."""
    stride = -(-end // 3)
    labels = {0: "1", 1: "10", 2: "100"}
    return [(100 * k / end, labels.get(k, f"1e{k}")) for k in range(0, end + 1, stride)]


def _row(layer: Layer, columns: Sequence[str], end: int) -> Row:
    kappas = [(name, layer.spectra.kappa(name)) for name in columns]
    # Later dots lie over earlier ones: as it is now on top.
    dots = tuple(
        (_pen(name).color, round(100 * math.log10(max(k, 1.0)) / end, 2), f"{_MEANINGS[name]}: κ = {number(k)}")
        for name, k in reversed(kappas)
        if math.isfinite(k)
    )
    places = [place for _, place, _ in dots] or [0.0]
    least = min((k for _, k in kappas if math.isfinite(k)), default=math.nan)
    return Row(layer.name, dots, (min(places), max(places) - min(places)), f"{number(layer.kappa_now)} → {number(least)}")


def _curves(tried: Sequence[Tried]) -> str:
    """Losses of what was tried."""

    def draw(axes: Axes) -> None:
        for i, one in enumerate(tried):
            if one.curve is not None:
                n = len(one.curve.losses)
                axes.plot(one.curve.steps[:n], one.curve.losses, color=pen(i).color, zorder=3)
        axes.set_xlabel("steps")
        thousands(axes)
        axes.set_ylabel("loss")
        lowest = min(min(one.curve.losses) for one in tried if one.curve is not None)
        if lowest > 0:
            axes.set_yscale("log")
            log_axis(axes.yaxis)

    return svg(draw, "tried", (5.2, 3.0))


def _drivers(layers: Sequence[Layer]) -> str:
    """κ as a product of means, scales and correlation: stacked on a logarithmic axis."""

    def draw(axes: Axes) -> None:
        for i, layer in enumerate(layers):
            left = 0.0
            parts = (layer.drivers.means, layer.drivers.scales, layer.drivers.correlation)
            for k, part in enumerate(parts):
                width = math.log10(part) if math.isfinite(part) and part > 1 else 0.0
                axes.barh(i, width, left=left, height=0.55, color=pen(k).color, zorder=3)
                left += width
        axes.set_yticks(range(len(layers)), [cut(layer.name, 40) for layer in layers])
        axes.set_ylim(len(layers) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("decades of κ")

    return svg(draw, "drivers", (9.0, 0.7 + 0.36 * len(layers)))


def _spectrum(layer: Layer, index: int) -> str:
    """Eigenvalues relative to the largest, before and after."""

    def draw(axes: Axes) -> None:
        low = 1.0
        for name in _SPECTRA:
            values = layer.spectra.values.get(name)
            if values is None or not len(values):
                continue
            y = (values / values[0]).clamp_min(1e-30).tolist()
            low = min(low, y[-1])
            marker: dict[str, Any] = {"marker": "o", "markersize": 3} if len(y) < 30 else {}
            axes.plot(range(1, len(y) + 1), y, color=_pen(name).color, zorder=3, **marker)
        axes.set_yscale("log")
        axes.set_ylim(low / 2, 2)
        axes.set_xlabel("eigenvalue")
        axes.set_ylabel("relative to the largest")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        log_axis(axes.yaxis)

    return svg(draw, f"spectrum-{index}")


def _heat(layer: Layer, index: int) -> str:
    """|correlation| of inputs."""

    def draw(axes: Axes) -> None:
        image = axes.imshow(np.abs(layer.correlation.numpy()), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        axes.grid(visible=False)
        axes.xaxis.set_major_locator(NullLocator())
        axes.yaxis.set_major_locator(NullLocator())
        figure = axes.figure
        bar = figure.colorbar(image, ax=axes, shrink=0.8, ticks=[0, 0.5, 1])
        bar.outline.set_visible(False)

    return svg(draw, f"heat-{index}", (3.4, 2.8))
