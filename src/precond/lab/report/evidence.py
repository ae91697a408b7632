"""Measured statements as one self-contained page, and as a table in Markdown."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from precond.lab.evidence import Bars, Plot, Section, Statement
from precond.lab.report.rendering import render_template
from precond.lab.report.style import log_axis, pen, svg
from precond.lab.workloads import write_atomically

SIGNS = {"holds": "✓", "holds as corrected": "✎", "holds in part": "◐", "fails": "✗"}
"""Of the verdicts."""


def number(x: float) -> str:
    """Four digits; few of what is as small as rounding.

    Example:
        >>> [number(x) for x in (0.954776, 468293000.0, 4683.2, 2.0, 1.9e-15, 0.0, float("nan"))]
        ['0.9548', '4.683e+08', '4,683', '2', '1.9e-15', '0', '–']
    """
    if not math.isfinite(x):
        return "–" if math.isnan(x) else str(x).replace("inf", "∞")
    if abs(x) >= 1000:
        return f"{x:,.0f}" if abs(x) < 1e6 else f"{x:.3e}"
    if abs(x) >= 1e-3 or x == 0:
        return f"{x + 0.0:.4g}"  # no −0
    return f"{x:.1e}".replace(".0e", "e")


_OF_SEEDS = (
    "*Measured* is the first seed's, with all samples of the data. Each further seed has other first weights, maps and vectors, and four fifths "
    "of the samples; what is expected may differ from seed to seed. *Seeds* counts those with which the statement holds."
)

# An underscore within a word, as in weight_decay, is none.
_INDEX = re.compile(r"(?<![A-Za-z]{2})([_^])(?:\{([^}]*)\}|(min|max|[A-Za-z0-9]))")


def formula(text: str) -> Markup:
    """Text with h_i and r^{t−1} as indices and exponents in HTML.

    Example:
        >>> formula("λ_min < r_{t+1}")
        Markup('λ<sub>min</sub> &lt; r<sub>t+1</sub>')
    """
    tags = {"_": "sub", "^": "sup"}
    return Markup(_INDEX.sub(lambda m: f"<{tags[m[1]]}>{m[2] or m[3]}</{tags[m[1]]}>", str(escape(text))))


def expected(statement: Statement) -> str:
    """The expected number, with its relation where that is none of equality."""
    finding = statement.finding
    return ("" if finding.relation == "=" else f"{finding.relation} ") + number(finding.expected)


def tolerance(statement: Statement) -> str:
    """The tolerance, or a dash where there is none."""
    return number(statement.finding.tolerance) if statement.finding.tolerance else "–"


def seeds(statement: Statement) -> str:
    """With how many seeds of how many it holds, and what lies between the least and the largest number measured; empty for one seed.

    Example:
        >>> from precond.lab.evidence.statement import Finding
        >>> seeds(Statement("a", "(1)", "claim", Finding("x", 1.0, 0.5, 0.0, "≤"), others=(Finding("x", 1.0, 2.0, 0.0, "≤"),)))
        '1 of 2 (0.5 to 2)'
    """
    if not statement.others:
        return ""
    low, high = statement.range
    return f"{statement.held} of {len(statement.findings)} ({number(low)} to {number(high)})"


def counts(sections: Sequence[Section]) -> dict[str, int]:
    """Number of statements by verdict."""
    return {v: sum(s.verdict == v for part in sections for s in part.statements) for v in SIGNS}


def render_evidence(sections: Sequence[Section], facts: dict[str, str], command: str) -> str:
    """The page, with styles and figures inside and nothing loaded from elsewhere; all text is escaped.

    Args:
        sections: what was measured.
        facts: how it was made, by name.
        command: that made it.
    """
    figures = {s.name: _figure(s) for section in sections for s in section.statements if s.finding.figure is not None}
    return render_template(
        "evidence.html",
        sections=sections,
        figures=figures,
        counts=counts(sections),
        number=number,
        formula=formula,
        expected=expected,
        tolerance=tolerance,
        seeds=seeds,
        signs=SIGNS,
        facts=facts,
        command=command,
        seconds=sum(s.seconds for section in sections for s in section.statements),
    )


def save_evidence(folder: Path, sections: Sequence[Section], facts: dict[str, str], command: str) -> None:
    """Write evidence.html and verify.md.

    Raises:
        WriteError: where they cannot be written.
    """
    write_atomically(folder / "evidence.html", render_evidence(sections, facts, command))
    write_atomically(folder / "verify.md", markdown(sections, command))


def markdown(sections: Sequence[Section], command: str) -> str:
    """A table per chapter, then what does not hold as printed."""
    found = counts(sections)
    lines = [
        "# The paper, measured",
        "",
        f"What `{command}` prints: each statement as a measurement on real data, the library's pieces against explicit computations in "
        f"float64. Of {sum(found.values())} statements {found['holds']} hold, {found['holds as corrected']} hold as corrected (✎, below), "
        f"{found['holds in part']} hold with some seeds and not with others, and {found['fails']} fail. "
        '<a href="evidence.html">The same with plots.</a>',
        "",
        _OF_SEEDS,
    ]
    for section in sections:
        lines += [
            "",
            f"## {section.title}",
            "",
            "| Statement | Measured is | Expected | Measured | Tolerance | Seeds (least to largest) | Verdict |",
            "|---|---|---|---|---|---|---|",
        ]
        for s in section.statements:
            cells = (
                f"{s.claim} *{s.where}*", f"{s.finding.quantity}; {s.finding.on}" if s.finding.on else s.finding.quantity,
                expected(s), number(s.finding.measured), tolerance(s), seeds(s) or "–", f"{SIGNS[s.verdict]} {s.verdict}",
            )  # fmt: skip
            lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    corrected = [s for section in sections for s in section.statements if s.correction]
    if corrected:
        lines += ["", "## Not as printed", ""]
        for s in corrected:
            lines.append(f"- **{s.where}.** {s.claim} {s.correction}{_as_printed(s)}")
    return "\n".join(lines) + "\n"


def _as_printed(statement: Statement) -> str:
    printed = statement.finding.printed
    return (
        ""
        if printed is None
        else f" ({statement.finding.quantity}: {number(printed)} as printed, {number(statement.finding.measured)} as corrected.)"
    )


def _figure(statement: Statement) -> Markup:
    figure = statement.finding.figure

    def draw(axes: Axes) -> None:
        if isinstance(figure, Plot):
            _plot(axes, figure)
        elif isinstance(figure, Bars):
            _bars(axes, figure)

    height = 0.75 + 0.3 * len(figure.values) if isinstance(figure, Bars) else 3.0
    return Markup(svg(draw, statement.name, (4.6, height)))


def _plot(axes: Axes, plot: Plot) -> None:
    if "x" in plot.log:
        axes.set_xscale("log")
    if "y" in plot.log:
        axes.set_yscale("log")
    for index, line in enumerate(plot.lines):
        look: dict[str, Any] = {"color": pen(index).color, "label": line.label}
        if line.points:
            axes.plot(line.x, line.y, "o", markersize=5, markeredgecolor="white", markeredgewidth=0.6, zorder=4, **look)
        else:
            # A prediction is drawn below what was measured, and wider, so that both show where they agree.
            axes.plot(
                line.x, line.y, linewidth=1.8 if index == 0 else 4.5, alpha=1 if index == 0 else 0.35, zorder=3 - index, **look
            )
    for axis, name in ((axes.xaxis, "x"), (axes.yaxis, "y")):
        if name in plot.log:
            log_axis(axis)
            low, high = sorted(axis.get_view_interval())
            if high > 1e6 * low:
                axis.set_major_locator(LogLocator(100.0))
    axes.set_xlabel(plot.x)
    axes.set_ylabel(plot.y)
    if len(plot.lines) > 1:
        axes.legend(frameon=False, fontsize=9)


def _bars(axes: Axes, bars: Bars) -> None:
    largest = max(value for _, value in bars.values)
    axes.set_xscale("log")
    axes.set_xlim(1, 10 ** (math.log10(largest) * 1.25 + 0.05))
    for index, (_, value) in enumerate(bars.values):
        axes.barh(index, value - 1, left=1, height=0.62, color=pen(0).color, alpha=0.85, zorder=3)
        axes.annotate(number(value), (value, index), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(range(len(bars.values)), [label for label, _ in bars.values])
    axes.set_ylim(len(bars.values) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(bars.x)
    log_axis(axes.xaxis)
