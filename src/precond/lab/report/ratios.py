"""Work to the target in units of a reference's, task by task and over all tasks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from precond.lab.report import numbers
from precond.lab.report.results import Clock, Entry, Results, TaskResults
from precond.lab.report.summary import Row, Work, table
from precond.lab.workloads import write_atomically


@dataclass(frozen=True)
class Ratio:
    """An entrant's work to the target over the reference's; where it did not reach the target, a lower bound of it."""

    value: float
    reached: bool

    def __str__(self) -> str:
        return f"{'' if self.reached else '> '}{numbers.short(self.value)}"


@dataclass(frozen=True)
class Overall:
    """Geometric means of an entrant's ratios over all tasks.

    Attributes:
        label: of the entrant.
        steps, seconds: ratios of steps and of seconds to the target; lower bounds where some target was not reached.
        tasks: how many tasks the means are over.
        missed: names of those in which it did not reach the target with most of its seeds.
    """

    label: str
    steps: Ratio
    seconds: Ratio
    tasks: int
    missed: tuple[str, ...]


def ratios(task: TaskResults, work: Work) -> dict[str, Ratio]:
    r"""Of each entrant: median work to the target, w, over that of the reference, w₀.

    Where the target was not reached w is at least the work W of the whole training, so that W/w₀ is a lower bound of the ratio. Where
    a training ended early its seconds per step are taken to go on to the end; where none made a step, W is the reference's.

    Args:
        task: with a reference.
        work: steps, gradients or seconds.

    Returns:
        By label; nothing where there is no reference or it did not reach the target itself.
    """
    rows = {row.label: row for row in table(task)}
    reference = rows.get(task.reference or "")
    unit = math.nan if reference is None else reference.to_target[work].median
    if not (math.isfinite(unit) and unit > 0):
        return {}
    length = max((run.curve.step[-1] for entry in task.entries for run in entry.runs if run.curve.step), default=0)
    entries = {entry.label: entry for entry in task.entries}
    whole = _whole(entries[str(task.reference)], work, length, math.nan)
    found = {}
    for label, row in rows.items():
        median = row.to_target[work].median
        reached = math.isfinite(median)
        found[label] = Ratio((median if reached else _whole(entries[label], work, length, whole)) / unit, reached)
    return found


def _whole(entry: Entry, work: Work, length: int, otherwise: float) -> float:
    """Work of a whole training, median over seeds."""
    columns = [run.curve.columns() for run in entry.runs if run.curve.step[-1:] > [0]]
    return statistics.median([c[work][-1] * length / c["step"][-1] for c in columns]) if columns else otherwise


def geometric_mean(values: Iterable[Ratio]) -> Ratio:
    """(Π rᵢ)^(1/n), a lower bound where one of them is.

    Example:
        >>> str(geometric_mean([Ratio(0.5, True), Ratio(2.0, True), Ratio(8.0, False)]))
        '> 2'
    """
    found = list(values)
    if not found:
        return Ratio(math.nan, True)
    # One that took no work, whose logarithm there is not, makes the mean 0.
    mean = 0.0 if any(r.value == 0 for r in found) else math.exp(statistics.fmean(math.log(r.value) for r in found))
    return Ratio(mean, all(r.reached for r in found))


def overall(results: Results) -> list[Overall]:
    """Of each entrant, in the order in which they were named; nothing where no task has a reference that reached its target."""
    steps = {task.name: found for task in results.tasks if (found := ratios(task, "step"))}
    seconds = {task.name: ratios(task, results.clock) for task in results.tasks if task.name in steps}
    labels = dict.fromkeys(label for found in steps.values() for label in found)
    summary = []
    for label in labels:
        of_steps = {name: found[label] for name, found in steps.items() if label in found}
        of_seconds = [found[label] for found in seconds.values() if label in found]
        missed = tuple(name for name, ratio in of_steps.items() if not ratio.reached)
        means = geometric_mean(of_steps.values()), geometric_mean(of_seconds)
        summary.append(Overall(label, *means, len(of_steps), missed))
    return summary


def as_json(results: Results) -> dict[str, Any]:
    """For results.json: the ratios of each task, and their means."""
    return {
        "tasks": {
            task.name: {
                work: {label: asdict(ratio) for label, ratio in ratios(task, work).items()} for work in ("step", results.clock)
            }
            for task in results.tasks
        },
        "geometric_mean": [asdict(one) for one in overall(results)],
    }


def markdown(results: Results) -> str:
    """The means and each task's ratios of steps and of seconds, as a table in Markdown; empty where there is no reference."""
    found = overall(results)
    if not found:
        return ""
    tasks = [(task.name, ratios(task, "step"), ratios(task, results.clock)) for task in results.tasks]
    head = ["entrant", "steps", "seconds", "reached", *(name for name, steps, _ in tasks if steps)]
    lines = [markdown_row(head), f"|---|{'---:|' * (len(head) - 1)}"]
    for one in found:
        cells = [one.label, str(one.steps), str(one.seconds), f"{one.tasks - len(one.missed)} of {one.tasks}"]
        cells += [
            f"{steps[one.label]} / {seconds[one.label]}" if one.label in steps and one.label in seconds else numbers.NONE
            for _, steps, seconds in tasks
            if steps
        ]
        lines.append(markdown_row(cells))
    return "\n".join(lines) + "\n"


def markdown_row(cells: Iterable[str]) -> str:
    """A row of a table in Markdown; names may hold bars and ends of lines."""
    return f"| {' | '.join(' '.join(cell.split()).replace('|', chr(92) + '|') for cell in cells)} |"


def save_summary(path: Path, results: Results, more: Iterable[str] = ()) -> None:
    """Write the means, more tables, and the table of each task, as Markdown.

    Raises:
        WriteError: where it cannot be written.
    """
    parts = [f"# {results.title}\n", *([found] if (found := markdown(results)) else []), *more]
    for task in results.tasks:
        goal = f"{'training' if task.target.part == 'train' else 'validation'} loss {numbers.short(task.target.value)}"
        parts += [f"## {task.name}\n", f"Target: {goal}, {task.target.rule}.\n", markdown_of_task(task, results.clock)]
    write_atomically(path, "\n".join(parts))


def markdown_of_task(task: TaskResults, clock: Clock) -> str:
    """Work to the target, ratios, final losses, test metric and learning rate of each entrant, as a table in Markdown."""
    steps, seconds = ratios(task, "step"), ratios(task, clock)
    tested = f"test {task.metric}" if task.metric else "test loss"
    head = ["entrant", "lr", "steps", "ratio", "seconds", "ratio", "training loss", "validation loss", tested]
    lines = [markdown_row(head), f"|---|{'---:|' * (len(head) - 1)}"]
    for row in table(task):
        ends = (row.train_loss, row.validation_loss)
        cells = [
            row.label + _trouble(row),
            numbers.short(row.lr),
            numbers.short(row.to_target["step"].median),
            str(steps.get(row.label, numbers.NONE)),
            numbers.short(row.to_target[clock].median),
            str(seconds.get(row.label, numbers.NONE)),
            *(numbers.NONE if s is None else numbers.short(s.median) for s in ends),
            numbers.metric_spread(row.test_metric, task.metric) if task.metric else numbers.loss_spread(row.test_loss),
        ]
        lines.append(markdown_row(cells))
    return "\n".join(lines) + "\n"


def _trouble(row: Row) -> str:
    if row.error:
        return f" (failed: {row.error})"
    return f" ({row.diverged} of {row.seeds} diverged)" if row.diverged else ""
