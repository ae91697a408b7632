"""From what the quadratic model predicts to an interval, by the calibration study that comes with the package."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import combinations
from statistics import median
from typing import Any

_SHARE = 0.8  # of cells that an interval shall hold
_APART = 1.2  # times as many steps: two remedies that differ by less are alike
_WIDE = 20  # times the low end: no plan is made with such an interval
_FILE = "calibration.json"


@dataclass(frozen=True)
class Gain:
    """Steps without a remedy over steps with it, to where the slower of both gets in :attr:`steps`.

    Attributes:
        low, likely, high: an interval that held four of five cells of the study, and what lies in its middle.
        steps: of the training.
        uncorrected: the ratio by the quadratic model alone, before the study corrected it.
        alone: by κ of the layer that gains most, alone and after very many steps: no bound on a short training of a network.

    As a number it is ``likely``: ``float(gain)``, ``f"{gain:.3g}"``, ``gain > 2``, ``sorted``; NaN where nothing is predicted (:data:`UNKNOWN`).

    Example:
        >>> gain = Gain(2.0, 3.0, 5.0, 200, 4.0, 900.0)
        >>> print(gain, f"({gain:.1f})", gain > 2)
        steps: about 2 to 5 times fewer, if the other layers keep up (3.0) True
    """

    low: float
    likely: float
    high: float
    steps: int
    uncorrected: float
    alone: float

    @property
    def known(self) -> bool:
        """Whether anything is predicted."""
        return not math.isnan(self.likely)

    def as_dict(self) -> dict[str, float] | None:
        """Its numbers, for JSON; None where nothing is predicted."""
        return vars(self) if self.known else None

    @property
    def worth(self) -> bool:
        """Whether more than a fifth of the steps is likely saved."""
        return self.likely >= 1.2

    def __float__(self) -> float:
        return self.likely

    def __format__(self, spec: str) -> str:
        return format(self.likely, spec) if spec else str(self)

    def __lt__(self, other: Gain | float) -> bool:
        return self.likely < float(other)

    def __gt__(self, other: Gain | float) -> bool:
        return self.likely > float(other)

    def __le__(self, other: Gain | float) -> bool:
        return self.likely <= float(other)

    def __ge__(self, other: Gain | float) -> bool:
        return self.likely >= float(other)

    def __str__(self) -> str:
        if not self.known:
            return "steps: not predicted"
        if self.high < 1.1:
            return "steps: no fewer"
        high = _factor(self.high)
        if self.low >= 1.1 and self.high > _WIDE * self.low:
            return f"steps: fewer, from {_factor(self.low)} to {high} times; trainings differed widely: try it"
        if self.low >= 1.1:
            return f"steps: about {_factor(self.low)} to {high} times fewer, if the other layers keep up"
        if self.low > 0.8:
            return f"steps: as many, or up to {high} times fewer"
        return f"steps: from {_factor(1 / self.low)} times more to {high} times fewer; try it"


UNKNOWN = Gain(math.nan, math.nan, math.nan, 0, math.nan, math.nan)
"""That of what no study is about."""


def _factor(x: float) -> str:
    """Two digits below 10, whole numbers above."""
    return f"{x:.0f}" if x >= 9.5 else f"{x:.1f}".removesuffix(".0")


@dataclass(frozen=True)
class Line:
    """log(measured) = a + b·log(predicted), and between which residuals four of five cells lie, in units of |log(predicted)| + unit.

    Where the quadratic model holds, a is 0: coordinates that change nothing change nothing, and the more they change, the less is known of it.
    Where units are stuck it need not hold, and residuals count as they are.
    """

    a: float
    b: float
    low: float
    high: float
    cells: int
    through: bool

    def middle(self, predicted: float) -> tuple[float, float]:
        """log of the ratio in the middle, and the unit of residuals there."""
        x = _log(predicted)
        return self.a + self.b * x, _unit(x, self.through)

    def gain(self, predicted: float, alone: float, steps: int) -> Gain:
        """Of a prediction."""
        middle, unit = self.middle(predicted)
        low, likely, high = (math.exp(middle + unit * x) for x in (self.low, (self.low + self.high) / 2, self.high))
        return Gain(min(low, steps), min(likely, steps), min(high, steps), steps, predicted, alone)


def _unit(x: float, through: bool) -> float:
    return abs(x) + math.log(2) if through else 1.0


@dataclass(frozen=True)
class Calibration:
    """The study in short.

    Attributes:
        lines: by (remedy, stuck).
        steps: of the trainings.
        cells: of the study.
        judged: how many of them had other tasks on their line.
        held: how many of these lay in the interval that the cells of the other tasks give.
        ahead: of those of which a gain of a fifth or more was likely, how many gained at all; and of how many.
        ordered: of two remedies in one setting that differed by a fifth or more, how often the likely gains were in the right order; and of
            how many pairs.
        best: in how many settings the remedy of the largest likely gain was the best one; and of how many.
    """

    lines: Mapping[tuple[str, bool], Line]
    steps: int
    cells: int
    judged: int
    held: int
    ahead: tuple[int, int]
    ordered: tuple[int, int]
    best: tuple[int, int]

    @property
    def short(self) -> str:
        """The same in a line."""
        return f"Gains: ratios of steps in {self.steps} steps; {self.held} of {self.judged} such intervals held."

    @property
    def sentence(self) -> str:
        """How right it was."""
        share = 100 * self.held / max(self.judged, 1)
        chance = 100 * (_SHARE * (1 - _SHARE) / max(self.judged, 1)) ** 0.5
        return (
            f"In a study of {self.cells} cells (small tasks, architectures, remedies at fitted rates; each task judged by the others), "
            f"{self.held} of {self.judged} measured ratios of steps ({share:.0f} %) lay in the predicted interval, which is made to "
            f"hold {100 * _SHARE:.0f} % (± {chance:.0f} of so many cells by chance); where a gain was likely, {self.ahead[0]} of "
            f"{self.ahead[1]} trainings needed fewer steps. Of two remedies the better one had the larger likely gain in "
            f"{self.ordered[0]} of {self.ordered[1]} pairs, and of all in {self.best[0]} of {self.best[1]} "
            "settings."
        )


@cache
def calibration() -> Calibration:
    """What comes with the package."""
    found = json.loads(files("precond.analysis.diagnostics").joinpath(_FILE).read_text(encoding="utf-8"))
    lines = {(line.pop("remedy"), line.pop("stuck")): Line(**line) for line in found["lines"]}
    pairs = (tuple(found[name]) for name in ("ahead", "ordered", "best"))
    return Calibration(lines, found["steps"], found["cells"], found["judged"], found["held"], *pairs)


@dataclass(frozen=True)
class Row:
    """A cell of the study.

    Attributes:
        task: of the setting.
        setting: task, architecture and optimizer: where remedies are compared.
        remedy, stuck: which line it belongs to: the remedy, and whether more than a quarter of the hidden units are saturated or dead, so
            that what layers receive tells little of what they will.
        predicted, measured: ratio of steps.
    """

    task: str
    setting: str
    remedy: str
    stuck: bool
    predicted: float
    measured: float


STUCK = 0.25
"""Of the hidden units."""


def fit(rows: Sequence[Row]) -> Line:
    """Least squares of logarithms, with the residuals of each task against the line of the others, where there are any."""
    through = not rows[0].stuck
    residuals = []
    for task in {row.task for row in rows}:
        a, b = _line([row for row in rows if row.task != task] or rows, through)
        for row in (row for row in rows if row.task == task):
            x = _log(row.predicted)
            residuals.append((math.log(row.measured) - a - b * x) / _unit(x, through))
    residuals.sort()
    a, b = _line(rows, through)
    return Line(a, b, _quantile(residuals, (1 - _SHARE) / 2), _quantile(residuals, (1 + _SHARE) / 2), len(rows), through)


def summary(rows: Sequence[Row], steps: int) -> dict[str, Any]:
    """The lines, and how right intervals are for tasks that had no part in them, as JSON's own types."""
    groups: dict[tuple[str, bool], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.remedy, row.stuck), []).append(row)
    judged, held, ahead = 0, 0, []
    likely: dict[str, list[tuple[float, float]]] = {}
    for members in groups.values():
        for row in members:
            if all(other.task == row.task for other in members):
                continue  # no other task to judge by
            judged += 1
            gain = fit([other for other in members if other.task != row.task]).gain(row.predicted, 1.0, steps)
            held += gain.low <= row.measured <= gain.high
            likely.setdefault(row.setting, []).append((gain.likely, row.measured))
            if gain.worth:
                ahead.append(row.measured > 1)
    lines = [{"remedy": r, "stuck": s, **vars(fit(members))} for (r, s), members in sorted(groups.items())]
    pairs = [
        (a[0] - b[0]) * (a[1] - b[1]) > 0
        for many in likely.values()
        for a, b in combinations(many, 2)
        if max(a[1], b[1]) > _APART * min(a[1], b[1])
    ]
    best = [max(many)[1] == max(measured for _, measured in many) for many in likely.values() if len(many) > 1]
    ratios = [math.exp(abs(math.log(row.measured / row.predicted))) for row in rows]
    return {
        "steps": steps, "cells": len(rows), "judged": judged, "held": held, "ahead": [sum(ahead), len(ahead)],
        "ordered": [sum(pairs), len(pairs)], "best": [sum(best), len(best)],
        "median factor between the uncorrected model and trainings": round(median(ratios), 3), "lines": lines,
    }  # fmt: skip


def _line(rows: Sequence[Row], through: bool) -> tuple[float, float]:
    """a and b ≥ 0: a prediction that tells nothing is not turned round. Rows count by the inverse square of the unit of their residuals."""
    x, y = [_log(row.predicted) for row in rows], [math.log(row.measured) for row in rows]
    w = [_unit(u, through) ** -2 for u in x]
    total = sum(w)
    mx = 0.0 if through else sum(k * u for k, u in zip(w, x, strict=True)) / total
    my = 0.0 if through else sum(k * v for k, v in zip(w, y, strict=True)) / total
    spread = sum(k * (u - mx) ** 2 for k, u in zip(w, x, strict=True))
    b = 0.0 if spread == 0 else sum(k * (u - mx) * (v - my) for k, u, v in zip(w, x, y, strict=True)) / spread
    b = max(b, 0.0)
    return my - b * mx, b


def _log(predicted: float) -> float:
    """Of a predicted ratio; that a remedy makes it ten times worse, or worse than that, is the same news."""
    return math.log(max(predicted, 0.1))


def _quantile(ordered: Sequence[float], share: float) -> float:
    """Of a sample as conformal intervals take it: of (n + 1) places, so that few cells make wide intervals."""
    place = share * (len(ordered) + 1) - 1
    place = min(max(place, 0.0), len(ordered) - 1.0)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
