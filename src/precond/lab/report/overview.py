"""What a page says of all tasks together: one number per task and entrant, and the means of ratios."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from precond.lab.report import numbers
from precond.lab.report.figures import WORK_LABELS
from precond.lab.report.plain import reference
from precond.lab.report.ratios import Ratio, overall, ratios
from precond.lab.report.results import Results, TaskResults
from precond.lab.report.style import Pen
from precond.lab.report.summary import Row, Spread, Work, table

# Value and text of one entrant in one task, by label.
_Found = dict[str, tuple[float, str]]

_OVER = "Medians over seeds, with the smallest and the largest in parentheses; the best of a task is in bold."
_TARGET = "Medians over seeds at the first evaluation that meets the task's target; – where it was not met."
_RATIO = (
    "Medians over seeds at the first evaluation that meets the task's target. > is a lower bound: the target was not met, and the "
    "work of the whole training is counted."
)


@dataclass(frozen=True)
class Cell:
    """A number in a table, and whether it is the best among those that it is compared with."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Matrix:
    """One number per task and entrant; the longer of both lists makes the rows.

    Attributes:
        heading, note: above and below it.
        corner: what its rows are.
        columns: headings.
        rows: name, the pen where it is an entrant, and numbers.
    """

    heading: str
    note: str
    corner: str
    columns: list[str]
    rows: Sequence[tuple[str, Pen | None, list[Cell]]]


@dataclass(frozen=True)
class Comparison:
    """Means of ratios to a reference.

    Attributes:
        reference: its label.
        rows: entrant, its pen, means of steps and of seconds, how many targets it reached, and the tasks where it did not.
    """

    reference: str
    rows: list[tuple[str, Pen, Cell, Cell, str, str]]


def matrices(results: Results, pens: Mapping[str, Pen]) -> list[Matrix]:
    """Tasks × entrants: what was reached, and after how much work."""

    def matrix(heading: str, note: str, of: Callable[[TaskResults], _Found], least: bool = True) -> Matrix:
        cells: dict[tuple[str, str], Cell] = {}
        for task in results.tasks:
            found = of(task)
            values = [value for value, _ in found.values() if math.isfinite(value)]
            top = (min if least else max)(values, default=math.nan)
            cells |= {(task.name, label): Cell(text, value == top) for label, (value, text) in found.items()}
        tasks, labels, none = [task.name for task in results.tasks], list(pens), Cell(numbers.NONE)
        if len(labels) <= len(tasks):
            rows = [(t, None, [cells.get((t, label), none) for label in labels]) for t in tasks]
            return Matrix(heading, note, "task", labels, rows)
        entrants = [(label, pens[label], [cells.get((t, label), none) for t in tasks]) for label in labels]
        return Matrix(heading, note, "entrant", tasks, entrants)

    def by_row(of: Callable[[TaskResults, Row], tuple[float, str]]) -> Callable[[TaskResults], _Found]:
        return lambda task: {row.label: of(task, row) for row in table(task)}

    def losses(of: Callable[[Row], Spread | None]) -> Callable[[TaskResults], _Found]:
        return by_row(lambda _, row: (_median(spread := of(row)), _ended(row, numbers.loss_spread(spread))))

    def tested(task: TaskResults, row: Row) -> tuple[float, str]:
        return _median(row.test_metric), _ended(row, numbers.metric_spread(row.test_metric, task.metric))

    def reach(work: Work) -> Callable[[TaskResults], _Found]:
        text = numbers.short if work == "step" else numbers.seconds
        return by_row(lambda _, row: (x := row.to_target[work].median, text(x)))

    def against(work: Work) -> Callable[[TaskResults], _Found]:
        return lambda task: {label: (_value(r), str(r)) for label, r in ratios(task, work).items()}

    metrics = {task.metric for task in results.tasks} - {None}
    clock = WORK_LABELS[results.clock][:1].upper() + WORK_LABELS[results.clock][1:]
    found = []
    if ref := reference(results):
        found.append(matrix(f"Steps to target, times those of {ref}", _RATIO, against("step")))
        found.append(matrix(f"{clock} to target, times those of {ref}", _RATIO, against(results.clock)))
    if metrics:
        found.append(matrix(f"Test {' or '.join(sorted(map(str, metrics)))}", _OVER, by_row(tested), least=False))
    if any(task.target.part == "train" for task in results.tasks):
        found.append(matrix("Final training loss", _OVER, losses(lambda row: row.train_loss)))
    found.append(matrix("Final validation loss", _OVER, losses(lambda row: row.validation_loss or row.train_loss)))
    found.append(matrix("Steps to target", _TARGET, reach("step")))
    found.append(matrix(f"{clock} to target", _TARGET, reach(results.clock)))
    return found


def against(results: Results, pens: Mapping[str, Pen]) -> Comparison | None:
    """Means of ratios, None where no task has a reference that reached its target."""
    found = overall(results)
    if not found:
        return None

    def cells(of: Callable[[int], Ratio]) -> list[Cell]:
        values = [of(i) for i in range(len(found))]
        least = min((r.value for r in values if r.reached), default=math.nan)
        return [Cell(str(r), r.reached and r.value == least) for r in values]

    steps, seconds = cells(lambda i: found[i].steps), cells(lambda i: found[i].seconds)
    rows = [
        (
            one.label,
            pens[one.label],
            steps[i],
            seconds[i],
            f"{one.tasks - len(one.missed)} of {one.tasks}",
            "; ".join(one.missed),
        )
        for i, one in enumerate(found)
    ]
    return Comparison(reference(results), rows)


def _value(ratio: Ratio) -> float:
    """A bound is not the best of anything."""
    return ratio.value if ratio.reached else math.nan


def _median(spread: Spread | None) -> float:
    return math.nan if spread is None else spread.median


def _ended(row: Row, text: str) -> str:
    if row.error:
        return "failed"
    diverged = f"{row.diverged} of {row.seeds} diverged"
    return diverged if row.diverged == row.seeds else f"{text}, {diverged}" if row.diverged else text
