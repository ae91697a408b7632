"""A diagnosis as one self-contained page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullLocator

from precond.diagnostics import Diagnosis, Layer
from precond.diagnostics.advice import number
from precond.diagnostics.diagnosis import LABELS, block_texts
from precond.report.rendering import render_template
from precond.report.style import Pen, log_axis, pen, svg
from precond.workloads import write_atomically

_ORDER = ("raw", "centered", "scaled", "bnp", "whitened", "optimizer")
_SPECTRA = ("raw", "bnp", "whitened", "optimizer")
_FIGURES = 12  # layers with figures of their own: those with the largest κ
_MEANINGS = {
    "raw": "as they are",
    "centered": "h − μ",
    "scaled": "h/σ",
    "bnp": "centered and scaled (BNP)",
    "whitened": "whitened, damped",
    "optimizer": "with the optimizer's P",
}


def render_diagnosis(found: Diagnosis, title: str, facts: dict[str, str], command: str = "") -> str:
    """The page, with styles and figures inside and nothing loaded from elsewhere; all text is escaped.

    Args:
        found: what to show.
        title: of the page.
        facts: what it is about and how it was made, by name.
        command: that made it, or nothing.
    """
    columns = [name for name in _ORDER if name in found.columns]
    shown = sorted(found.layers, key=lambda layer: -_finite(layer.kappa_now))[:_FIGURES]
    shown = [layer for layer in found.layers if layer in shown]
    return render_template(
        "diagnosis.html",
        title=title,
        command=command,
        facts=facts,
        found=found,
        cards=_cards(found),
        verdict=found.verdict,
        advice=[(a, number(a.gain)) for a in found.advice],
        columns=[LABELS.get(name, name) for name in columns],
        rows=[(layer, _cells(layer, columns)) for layer in found.layers],
        legend=[(_MEANINGS[name], _pen(name)) for name in columns],
        kappas=Markup(_kappas(found.layers, columns)) if found.layers else None,
        spectra=[(layer.name, Markup(_spectrum(layer, i))) for i, layer in enumerate(shown)],
        spectra_legend=[(_MEANINGS[name], _pen(name)) for name in _SPECTRA if name in columns],
        drivers=Markup(_drivers(found.layers)) if found.layers else None,
        heat=[(layer.name, Markup(_heat(layer, i))) for i, layer in enumerate(shown) if layer.correlation.shape[0] > 1],
        blocks=[(layer.name, block_texts(layer)) for layer in found.layers] if found.matrix != "none" else [],
        matrix="Hessian" if found.matrix == "hessian" else "Gauss–Newton matrix",
        left_out=len(found.layers) - len(shown),
    )


def save_diagnosis(path: Path, found: Diagnosis, title: str, facts: dict[str, str], command: str = "") -> None:
    """Write the page.

    Raises:
        WriteError: where it cannot be written.
    """
    write_atomically(path, render_diagnosis(found, title, facts, command))


def _finite(x: float) -> float:
    return x if math.isfinite(x) else 0.0


def _pen(name: str) -> Pen:
    return pen(_ORDER.index(name))


def _cards(found: Diagnosis) -> list[tuple[str, str, str]]:
    """What a reader wants to know first: heading, number, explanation."""
    cards = []
    if found.layers:
        worst = max(found.layers, key=lambda layer: _finite(layer.kappa_now))
        own = "with its P" if "optimizer" in worst.spectra.values else "of the inputs"
        cards.append(("Largest κ " + own, number(worst.kappa_now), f"layer {worst.name}, driven by {worst.drivers.main}"))
    if found.advice:
        cards.append(("Largest predicted gain", f"×{number(found.advice[0].gain)}", found.advice[0].what))
    if found.lr is not None and found.lr_limit is not None:
        share = f"{100 * found.lr / found.lr_limit:.3g} %"
        cards.append(("Learning rate against its limit", share, f"{number(found.lr)}; unstable above {number(found.lr_limit)}"))
    bad = sum(layer.units.bad for layer in found.layers)
    cards.append(("Inputs that carry nothing", str(bad), "dead, constant or saturated, over all layers"))
    return cards


def _cells(layer: Layer, columns: Sequence[str]) -> list[str]:
    return [number(layer.spectra.kappa(name)) for name in columns]


def _kappas(layers: Sequence[Layer], columns: Sequence[str]) -> str:
    """Bars of κ per layer and coordinates."""

    def draw(axes: Axes) -> None:
        height = 0.8 / len(columns)
        for j, name in enumerate(columns):
            places = [i + (j - (len(columns) - 1) / 2) * height for i in range(len(layers))]
            values = [_finite(layer.spectra.kappa(name)) for layer in layers]
            axes.barh(places, [max(x, 1.0) for x in values], height=0.86 * height, color=_pen(name).color, left=0, zorder=3)
        axes.set_xscale("log")
        largest = max((_finite(layer.spectra.kappa(name)) for layer in layers for name in columns), default=10.0)
        axes.set_xlim(1, max(largest * 1.6, 10))
        axes.set_yticks(range(len(layers)), [layer.name for layer in layers])
        axes.set_ylim(len(layers) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("κ of the extended inputs")
        log_axis(axes.xaxis)

    return svg(draw, "kappas", (9.0, 0.7 + len(layers) * (0.18 + 0.12 * len(columns))))


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
        axes.set_yticks(range(len(layers)), [layer.name for layer in layers])
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
