"""Iterations of gradient descent in several coordinates, as JSON and as one self-contained page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes

from precond.lab.report.numbers import NONE
from precond.lab.report.rendering import render_template
from precond.lab.report.results import to_json
from precond.lab.report.style import log_axis, pen, svg
from precond.lab.workloads import write_atomically
from precond.lab.workloads.logistic import Descent, Logistic


def rows(found: Sequence[Descent]) -> list[tuple[str, str, str, str, str, str]]:
    """Label, κ, learning rate, predicted and counted iterations, and the last gap, as text."""
    return [
        (
            d.label,
            f"{d.kappa:.3g}",
            f"{d.lr:.3g}",
            f"{d.predicted:,.0f}" if d.predicted < 1e7 else f"{d.predicted:.1e}" if math.isfinite(d.predicted) else NONE,
            f"{d.reached:,}" if d.reached is not None else f"not in {d.iterations[-1]:,}",
            f"{d.gap[-1]:.2g}",
        )
        for d in found
    ]


def save_logistic(
    folder: Path, found: Sequence[tuple[Logistic, Sequence[Descent]]], facts: Mapping[str, Any], tolerance: float, command: str
) -> None:
    """Write results.json and report.html.

    Args:
        folder: where to.
        found: each problem with its descents.
        facts: settings, versions and machine, by name.
        tolerance: gap that counts as reached.
        command: that made it.

    Raises:
        WriteError: where a file cannot be written.
    """
    problems = [
        {"data": p.name, "examples": len(p.X), "features": p.X.shape[1], "classes": p.classes, "l2": p.l2, "lowest": p.lowest,
         "descents": [asdict(d) for d in descents]}
        for p, descents in found
    ]  # fmt: skip
    content = to_json({"command": command, "tolerance": tolerance, **facts, "problems": problems})
    write_atomically(folder / "results.json", json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n")
    write_atomically(folder / "report.html", render_logistic(found, facts, tolerance, command))


def render_logistic(
    found: Sequence[tuple[Logistic, Sequence[Descent]]], facts: Mapping[str, Any], tolerance: float, command: str
) -> str:
    """The page, with styles and figures inside and nothing loaded from elsewhere; all text is escaped."""
    return render_template(
        "logistic.html",
        command=command,
        facts=facts,
        tolerance=f"{tolerance:g}",
        legend=[(d.label, pen(i)) for i, d in enumerate(found[0][1])],
        problems=[(p, f"{p.l2:g}", list(zip(rows(ds), map(pen, range(len(ds))), strict=True)), Markup(gaps(ds, tolerance, p.name)))
                  for p, ds in found],
    )  # fmt: skip


def gaps(descents: Sequence[Descent], tolerance: float, name: str) -> str:
    """(F − F*)/(F₀ − F*) against iterations, both axes logarithmic; an SVG element."""

    def draw(axes: Axes) -> None:
        for index, d in enumerate(descents):
            look = pen(index)
            y = [min(max(g, tolerance / 10), 1e3) for g in d.gap]
            axes.plot([max(k, 0.7) for k in d.iterations], y, color=look.color, linestyle=look.dashes)
        axes.axhline(tolerance, color="#616e7c", linewidth=1, linestyle=(0, (2, 2)))
        axes.set_xscale("log")
        axes.set_yscale("log")
        log_axis(axes.xaxis)
        log_axis(axes.yaxis)
        axes.set_xlabel("iterations")
        axes.set_ylabel("gap to the optimum, relative to the start")

    return svg(draw, f"gaps-{name}", (8.0, 3.6))
