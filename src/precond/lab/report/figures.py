"""Curves of losses and metrics, and the searches of learning rates."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from precond.lab.report.results import Entry, Results, TaskResults
from precond.lab.report.style import Pen, log_axis, svg, thousands
from precond.lab.report.summary import Work, profile

WORK_LABELS: dict[Work, str] = {
    "step": "steps",
    "gradients": "gradient evaluations",
    "seconds": "seconds of training",
    "cpu_seconds": "CPU seconds of training",
}

# Losses that spread over a larger ratio are drawn on a logarithmic scale.
_LOG_FROM = 8.0


@dataclass(frozen=True)
class Band:
    """Median, smallest and largest value over the seeds, at evaluations that at least one seed reached."""

    x: list[float]
    middle: list[float]
    low: list[float]
    high: list[float]


def band(entry: Entry, column: str, work: Work) -> Band:
    """Of one column of an entrant's curves.

    Seeds are evaluated at the same steps; the work at an evaluation is the median over them.
    """
    runs = [run.curve.columns() for run in entry.runs]
    x, middle, low, high = [], [], [], []
    for i in range(max(len(run[column]) for run in runs)):
        values = [run[column][i] for run in runs if i < len(run[column])]
        x.append(statistics.median(run[work][i] for run in runs if i < len(run[column])))
        middle.append(statistics.median(values))
        low.append(min(values))
        high.append(max(values))
    return Band(x, middle, low, high)


def curves(results: TaskResults, pens: Mapping[str, Pen], column: str, work: Work, name: str) -> str:
    """All entrants in one figure: medians with bands from the smallest to the largest seed.

    Args:
        results: what to draw.
        pens: by label.
        column: ``"validation_loss"``, ``"train_metric"``, ….
        work: the abscissa.
        name: of the figure on its page.

    Returns:
        An SVG element.
    """
    bands = [band(entry, column, work) for entry in results.entries]
    is_loss = column.endswith("loss")
    faint = min(0.13, 0.8 / len(bands))  # many bands one upon another must not hide the lines

    def draw(axes: Axes) -> None:
        for entry, one in zip(results.entries, bands, strict=True):
            if not one.x:
                continue
            look = pens[entry.label]
            axes.plot(one.x, one.middle, color=look.color, linestyle=look.dashes, zorder=3)
            if len(entry.runs) > 1:
                axes.fill_between(one.x, one.low, one.high, color=look.color, alpha=faint, linewidth=0, zorder=2)
            if any(run.status == "diverged" for run in entry.runs):
                axes.plot(one.x[-1:], one.middle[-1:], "X", color=look.color, markersize=7, markeredgecolor="white", zorder=4)
        if is_loss:
            _loss_axis(axes, bands)
            low, high = axes.get_ylim()
            if results.target.part == column.removesuffix("_loss") and low < results.target.value < high:
                _target_line(axes, results.target.value)
        else:
            _metric_axis(axes, bands, results.metric)
        axes.set_xlim(0, max((one.x[-1] for one in bands if one.x), default=1) * 1.01 or 1)
        axes.set_xlabel(WORK_LABELS[work])
        if work in ("step", "gradients"):
            thousands(axes)

    return svg(draw, name)


def _target_line(axes: Axes, value: float) -> None:
    axes.axhline(value, color="#616e7c", linewidth=1, linestyle=(0, (2, 2)), zorder=1)
    place: dict[str, Any] = {"xy": (1, value), "xycoords": ("axes fraction", "data"), "xytext": (-2, 3)}
    axes.annotate("target", **place, textcoords="offset points", ha="right", va="bottom", fontsize=8.5, color="#616e7c")


def _loss_axis(axes: Axes, bands: Sequence[Band]) -> None:
    values = [y for one in bands for y in (*one.low, *one.middle)]
    # One entrant's excursion must not flatten all the others: nothing is drawn far above where the trainings began.
    ceiling = 1.5 * max((one.high[0] for one in bands if one.high), default=1.0)
    low, high = min(values, default=0.5), min(max((y for one in bands for y in one.high), default=1.0), ceiling)
    if low > 0 and high / low > _LOG_FROM:
        axes.set_yscale("log")
        axes.set_ylim(low * 0.85, high * 1.15)
        log_axis(axes.yaxis)
    else:
        margin = 0.05 * (high - low) or 0.5
        axes.set_ylim(low - margin, high + margin)


def _metric_axis(axes: Axes, bands: Sequence[Band], metric: str | None) -> None:
    # The differences are at the end: what lies far below the worst end is cut off.
    ends = [one.middle[-1] for one in bands if one.middle] or [0.0]
    best = max((y for one in bands for y in one.high), default=1.0)
    low = max(0.0 if metric == "accuracy" else -1.0, min(ends) - max(0.05, 0.6 * (best - min(ends))))
    axes.set_ylim(low, best + 0.03 * (best - low or 1))
    if metric == "accuracy":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g} %" if y <= 1 else ""))


def searches(results: TaskResults, pens: Mapping[str, Pen], name: str) -> str:
    """Final loss of every trial, on the part that judges, against its learning rate; the chosen one is marked."""

    def draw(axes: Axes) -> None:
        losses = [trial.loss for entry in results.entries for trial in entry.search if math.isfinite(trial.loss)]
        axes.set_xscale("log")
        for entry in results.entries:
            look = pens[entry.label]
            trials = sorted((t for t in entry.search if math.isfinite(t.loss)), key=lambda t: t.lr)
            style: dict[str, Any] = {"color": look.color, "linestyle": look.dashes}
            axes.plot([t.lr for t in trials], [t.loss for t in trials], marker="o", markersize=3.5, **style)
            chosen = [t for t in trials if t.lr == entry.lr]
            axes.plot([t.lr for t in chosen], [t.loss for t in chosen], "o", markersize=9, markerfacecolor="white",
                      markeredgecolor=look.color, markeredgewidth=2.2, zorder=4)  # fmt: skip
        rates = [trial.lr for entry in results.entries for trial in entry.search]
        axes.set_xlim(min(rates) / 1.4, max(rates) * 1.4)
        log_axis(axes.xaxis)
        # As in the curves: a trial that ended far above where it began must not flatten all the others.
        column = f"{'train' if results.judge == 'training' else 'validation'}_loss"
        began = [found[0] for entry in results.entries for run in entry.runs if (found := run.curve.columns()[column])]
        high = min(max(losses, default=1.0), 1.5 * max(began, default=math.inf))
        if losses and min(losses) > 0 and high / min(losses) > _LOG_FROM:
            axes.set_yscale("log")
            axes.set_ylim(min(losses) * 0.7, high * 1.15)
            log_axis(axes.yaxis)
        axes.set_xlabel("learning rate")
        axes.set_ylabel(f"final {results.judge} loss")

    return svg(draw, name, (8.0, 3.3))


def profiles(results: Results, pens: Mapping[str, Pen], work: Work, name: str) -> str:
    """Performance profile: the share of the tasks in which an entrant's work to the target is at most τ times the least."""
    found = profile(results, work)
    finite = [x for ratios in found.values() for x in ratios if math.isfinite(x)]
    end = max(2.0, 1.1 * max(finite, default=2.0))

    def draw(axes: Axes) -> None:
        for label, ratios in found.items():
            reached = [x for x in ratios if math.isfinite(x)]
            share = [(i + 1) / len(ratios) for i in range(len(reached))]
            look = pens[label]
            axes.step([1.0, *reached, end], [0.0, *share, *(share[-1:] or [0.0])], where="post", color=look.color,
                      linestyle=look.dashes)  # fmt: skip
        axes.set_xscale("log")
        axes.set_xlim(1.0, end)
        axes.set_ylim(0, 1.02)
        log_axis(axes.xaxis)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g} %"))
        axes.set_xlabel(f"{WORK_LABELS[work]} to target, times the least")
        axes.set_ylabel("tasks")

    return svg(draw, name)
