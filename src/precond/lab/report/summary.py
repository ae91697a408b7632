"""From trainings to a table: what was reached, and after how much work."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from precond.lab.report.results import Entry, Results, Target, TaskResults
from precond.lab.workloads import Outcome

Work = Literal["step", "gradients", "seconds", "cpu_seconds"]
WORKS: tuple[Work, ...] = ("step", "gradients", "seconds", "cpu_seconds")


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest value over the seeds that finished."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Iterable[float | None]) -> Spread | None:
        """Of the values that are there; None where there is none."""
        found = [x for x in values if x is not None and math.isfinite(x)]
        if not found:
            return None
        return Spread(statistics.median(found), min(found), max(found))


@dataclass(frozen=True)
class Reach:
    """Work to the target: of each seed (NaN: not reached), and the median, NaN where it is not reached."""

    seeds: tuple[float, ...]

    @property
    def reached(self) -> int:
        """Number of seeds that reached the target."""
        return sum(math.isfinite(x) for x in self.seeds)

    @property
    def median(self) -> float:
        """A seed that did not reach the target counts as infinitely late."""
        middle = statistics.median(math.inf if math.isnan(x) else x for x in self.seeds)
        return middle if math.isfinite(middle) else math.nan


@dataclass(frozen=True)
class Row:
    """One entrant in the final table. Losses and metrics are those after the last step."""

    label: str
    lr: float
    seeds: int
    diverged: int
    error: str | None
    train_loss: Spread | None
    validation_loss: Spread | None
    validation_metric: Spread | None
    test_loss: Spread | None
    test_metric: Spread | None
    gradients: Spread | None
    seconds: Spread | None
    cpu_seconds: Spread | None
    to_target: dict[Work, Reach]

    def as_dict(self) -> dict[str, Any]:
        """For results.json."""
        reach = {work: {"seeds": r.seeds, "reached": r.reached, "median": r.median} for work, r in self.to_target.items()}
        return {**asdict(self), "to_target": reach}


def default_target(
    entries: Iterable[Entry],
    reference: str | None = None,
    allowance: float = 0.1,
    part: Literal["validation", "train"] = "validation",
) -> Target:
    """The best loss of a reference (median over its seeds, of two middles the higher), and an allowance, so that it is met before the end.

    Where there is no validation part, the training loss takes its place.

    Args:
        entries: all entrants.
        reference: its label; None, or where it did not finish: the first entrant that did.
        allowance: in units of that loss.
        part: whose loss it is.
    """
    for entry in sorted(entries, key=lambda e: e.label != reference):
        finished = [run for run in entry.runs if run.status == "finished"]
        if finished:
            part = part if finished[0].curve.validation_loss else "train"
            # The higher one of two middles, so that the reference itself meets it with most of its seeds.
            best = statistics.median_high(min(losses(run, part)) for run in finished)
            rule = f"the best {'training' if part == 'train' else part} loss of {entry.label} (median over seeds)" + (
                f" and {allowance:.0%} more" if allowance else ""
            )
            return Target(best + allowance * abs(best), part, rule)
    return Target(math.nan, part, "none, because no entrant finished")


def losses(run: Outcome, part: Literal["validation", "train"]) -> list[float]:
    """Column of a curve."""
    return run.curve.validation_loss if part == "validation" else run.curve.train_loss


def work_to_target(run: Outcome, target: Target, work: Work) -> float:
    """Work done at the first evaluation that meets the target; NaN where none does."""
    column: list[float] = run.curve.columns()[work]
    return next((float(w) for w, loss in zip(column, losses(run, target.part), strict=True) if loss <= target.value), math.nan)


def table(task: TaskResults) -> list[Row]:
    """The final table, in the order of the entrants."""
    return [_row(entry, task.target) for entry in task.entries]


def profile(results: Results, work: Work) -> dict[str, list[float]]:
    """For each entrant how many times as much work as the least of a task its target took, inf where it was not reached.

    Sorted; one number for each task in which someone reached the target. Performance profiles (Dolan & Moré, 2002) show for
    how large a share of the tasks an entrant stays below a ratio.
    """
    found: dict[str, list[float]] = {entry.label: [] for task in results.tasks for entry in task.entries}
    for task in results.tasks:
        medians = {row.label: row.to_target[work].median for row in table(task)}
        least = min((x for x in medians.values() if math.isfinite(x)), default=math.nan)
        if not math.isfinite(least):
            continue
        for label, ratios in found.items():
            x = medians.get(label, math.nan)
            ratios.append(math.inf if math.isnan(x) else x / least if least > 0 else 1.0 if x == 0 else math.inf)
    return {label: sorted(ratios) for label, ratios in found.items()}


def _row(entry: Entry, target: Target) -> Row:
    done = [run for run in entry.runs if run.status == "finished"]

    def last(column: str) -> Spread | None:
        return Spread.of(values[-1] for run in done if (values := run.curve.columns()[column]))

    return Row(
        entry.label,
        entry.lr,
        len(entry.runs),
        sum(run.status == "diverged" for run in entry.runs),
        entry.error,
        last("train_loss"),
        last("validation_loss"),
        last("validation_metric"),
        Spread.of(run.test_loss for run in done),
        Spread.of(run.test_metric for run in done),
        last("gradients"),
        last("seconds"),
        last("cpu_seconds"),
        {work: Reach(tuple(work_to_target(run, target, work) for run in entry.runs)) for work in WORKS},
    )


def at_edge(entry: Entry) -> bool:
    """Whether a search ended at an end of its grid, so that a better learning rate may lie beyond."""
    rates = [trial.lr for trial in entry.search]
    return len(rates) > 2 and any(math.isfinite(t.loss) for t in entry.search) and entry.lr in (min(rates), max(rates))
