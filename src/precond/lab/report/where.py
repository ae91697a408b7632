"""Where input-side preconditioning pays: what was predicted before training against what was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace

from matplotlib.axes import Axes

from precond.lab.report import numbers
from precond.lab.report.ratios import markdown_row, ratios
from precond.lab.report.results import Results, TaskResults
from precond.lab.report.signs import CERTAIN, probabilities
from precond.lab.report.style import log_axis, pen, svg, svg_file
from precond.lab.report.summary import default_target
from precond.lab.workloads.measured import Measured
from precond.lab.workloads.where import Prediction

ADVISED, GAINED = 1.2, 1.05
"""A gain is predicted from the one on, and was there from the other on: what pays must save a sixth of the steps to be advised, and more steps
than evaluations can tell to have paid."""

_SHOWN = 50.0  # beyond it a gain is drawn at the edge


@dataclass(frozen=True)
class Outcome:
    """One remedy in one cell.

    Attributes:
        cell, label: of both.
        predicted: gain before training.
        measured: steps of the base to its own lowest loss over those of the remedy.
        bound: whether the remedy did not reach that loss, so that its gain is less than ``measured``.
        traits, numbers: what else was known before training.
    """

    cell: str
    label: str
    predicted: float
    measured: float
    bound: bool
    traits: tuple[float, ...] = ()
    numbers: Measured | None = None

    @property
    def advised(self) -> bool:
        """Whether a gain was predicted."""
        return self.predicted >= ADVISED

    @property
    def gained(self) -> bool:
        """Whether there was one."""
        return not self.bound and self.measured >= GAINED

    @property
    def right(self) -> bool:
        """Whether the prediction had the right sign."""
        return self.advised == self.gained


def outcomes(results: Results, predictions: Sequence[Prediction]) -> list[Outcome]:
    """Predictions beside what came of them; left out is what nothing was predicted of, and cells whose base has no target."""
    found = {task.name: ratios(task, "step") for task in results.tasks}
    return [
        Outcome(p.task, p.label, p.gain, 1 / ratio.value, not ratio.reached, p.traits, p.measured)
        for p in predictions
        if (ratio := found.get(p.task, {}).get(p.label)) is not None and not math.isnan(p.gain)
    ]


def agreements(results: Results) -> list[bool]:
    """Whether trainings with one seed and those with the other seeds say the same of a gain, for each cell, remedy and seed.

    No prediction made before training can be expected to be right more often. A gain is one as of :class:`Outcome`.
    """
    found: list[bool] = []
    for task in results.tasks:
        seeds = sorted({run.seed for entry in task.entries for run in entry.runs})
        for seed in seeds if len(seeds) > 1 else ():
            alone, others = _gains(task, {seed}), _gains(task, set(seeds) - {seed})
            found += [gained == others[label] for label, gained in alone.items() if label in others]
    return found


def _gains(task: TaskResults, seeds: set[int]) -> dict[str, bool]:
    """Whether each remedy gained by the trainings with these seeds."""
    entries = tuple(replace(e, runs=tuple(run for run in e.runs if run.seed in seeds)) for e in task.entries)
    some = replace(task, entries=entries, target=default_target(entries, task.reference, 0.0, "train"))
    return {
        label: Outcome(task.name, label, math.nan, 1 / ratio.value, not ratio.reached).gained
        for label, ratio in ratios(some, "step").items()
        if label != task.reference
    }


def where_markdown(results: Results, predictions: Sequence[Prediction]) -> str:
    """Shares of right signs, the misses, and all cells."""
    found = outcomes(results, predictions)
    head = ["remedy", "cells", "sign right", *_KINDS.values(), "gain, geometric mean", "rank correlation"]
    lines = [markdown_row(head), f"|---|{'---:|' * (len(head) - 1)}"]
    for label in (*dict.fromkeys(one.label for one in found), "both"):
        chosen = [one for one in found if label in ("both", one.label)]
        if chosen:
            lines.append(markdown_row([label, *_summed(chosen)]))
    parts = [
        "# Where input-side preconditioning pays\n",
        f"`{results.command}`\n",
        "\n".join(lines) + "\n",
        f"A gain is predicted where the predicted ratio of steps is at least {ADVISED}; there was one where the remedy reached AdamW's lowest "
        f"training loss in at most 1/{GAINED} of its steps. < is an upper bound: that loss was not reached. Means count bounds as they stand.\n",
    ]
    if agree := agreements(results):
        parts.append(
            f"How often can a prediction be right? The sign found with one seed is that found with the others in {_share(agree)}.\n"
        )
    parts += [_rules(found)]
    for heading, rows in (("Misses", [one for one in found if not one.right]), ("All", found)):
        cells = (
            (one.cell, one.label, numbers.short(one.predicted), ("< " if one.bound else "") + numbers.short(one.measured),
             "right" if one.right else "wrong")
            for one in rows
        )  # fmt: skip
        table = [
            markdown_row(["cell", "remedy", "predicted", "measured", "sign"]),
            "|---|---|---:|---:|---|",
            *map(markdown_row, cells),
        ]
        parts += [f"## {heading}\n", "\n".join(table) + "\n"]
    return "\n".join(parts)


def _rules(found: Sequence[Outcome]) -> str:
    """How right rules are that learn the sign from the cells of other data."""
    labels = list(dict.fromkeys(one.label for one in found))
    first = [(math.log(one.predicted), float(labels.index(one.label)), *one.traits) for one in found]
    lines = [
        "## Rules that learn from other data\n",
        "The sign by a logistic regression, each data set judged by the cells of the others.\n",
        f"- On the predicted ratio, the remedy, and whether the model has batch or other normalization and the inputs variance 1: "
        f"{_judged(first, found)}",
    ]
    if all(one.numbers for one in found):
        names = [f.name for f in fields(Measured)]
        second = [(*row, *astuple(one.numbers)) for row, one in zip(first, found, strict=True) if one.numbers]
        lines.append(f"- With what is measured besides ({', '.join(names)}): {_judged(second, found)}")
    return "\n".join(lines) + "\n"


def _judged(features: Sequence[tuple[float, ...]], found: Sequence[Outcome]) -> str:
    data = [one.cell.split(":")[0].split(",")[0] for one in found]
    chances = probabilities(features, [one.gained for one in found], data)
    right = [(p > 0.5) == one.gained for p, one in zip(chances, found, strict=True)]
    kept = [ok for ok, p in zip(right, chances, strict=True) if max(p, 1 - p) >= CERTAIN]
    return f"right in {_share(right)}. Where its probability is at least {CERTAIN}: right in {_share(kept)}; it abstains in the others."


def _share(right: Sequence[bool]) -> str:
    return f"{sum(right)} of {len(right)}" + (f" ({100 * sum(right) / len(right):.0f} %)" if right else "")


_KINDS = {
    (True, True): "predicted and gained",
    (True, False): "predicted, no gain",
    (False, True): "not predicted, gained",
    (False, False): "neither",
}


def _summed(found: Sequence[Outcome]) -> list[str]:
    counts = (str(sum((one.advised, one.gained) == kind for one in found)) for kind in _KINDS)
    mean = math.exp(sum(math.log(one.measured) for one in found) / len(found))
    share = _share([one.right for one in found])
    return [str(len(found)), share, *counts, numbers.short(mean), f"{_spearman(found):.2f}"]


def _spearman(found: Sequence[Outcome]) -> float:
    from scipy.stats import spearmanr

    if len({one.predicted for one in found}) < 2 or len({one.measured for one in found}) < 2:
        return math.nan
    return float(spearmanr([one.predicted for one in found], [one.measured for one in found]).statistic)


def where_figure(results: Results, predictions: Sequence[Prediction]) -> str:
    """Measured against predicted gains, both logarithmic; what lies beyond 50 is drawn at the edge. A complete SVG file."""
    found = outcomes(results, predictions)

    def draw(axes: Axes) -> None:
        axes.set_xscale("log")
        axes.set_yscale("log")
        for number, label in enumerate(dict.fromkeys(one.label for one in found)):
            chosen = [one for one in found if one.label == label]
            x = [min(one.predicted, _SHOWN) for one in chosen]
            axes.scatter(x, [one.measured for one in chosen], s=18, color=pen(number).color, label=label, zorder=3)
        axes.axvline(ADVISED, color="#616e7c", linewidth=1, linestyle=(0, (2, 2)))
        axes.axhline(GAINED, color="#616e7c", linewidth=1, linestyle=(0, (2, 2)))
        log_axis(axes.xaxis)
        log_axis(axes.yaxis)
        axes.set_xlabel("predicted gain (beyond 50 at the edge)")
        axes.set_ylabel("measured gain in steps")
        axes.legend(frameon=False, fontsize=8)

    return svg_file(svg(draw, "where", (6.4, 4.2)))
