"""Tables on the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from precond.lab.report import Clock, Results, TaskResults, numbers, overall, table

_FIRST = 16  # columns that the first one can do with: it folds


def drawn(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> RenderableType:
    """A table of a name and numbers; where there is no room for it a paragraph for each row, since a number that is cut is another one.

    Args:
        title: above it.
        headings: of the columns.
        rows: texts.
        width: of the terminal.
    """
    widths = [max(map(cell_len, column)) for column in zip(headings, *rows, strict=True)]
    if min(widths[0], _FIRST) + sum(widths[1:]) + 3 * len(widths) + 1 > width:
        pairs = ((row[0], zip(headings[1:], row[1:], strict=True)) for row in rows)
        return Text("\n".join([title, *(f"{name}: {'; '.join(map(' '.join, cells))}" for name, cells in pairs)]))
    found = Table(title=title, title_justify="left")
    found.add_column(headings[0], overflow="fold")
    for heading in headings[1:]:
        found.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        found.add_row(*map(Text, row))
    return found


def final_tables(results: Results, width: int) -> Iterator[RenderableType]:
    """Of each task: entrants, their losses after the last step, and the work to the target (medians over seeds)."""
    for task in results.tasks:
        title = f"{results.title}: {task.name}" if len(results.tasks) > 1 else results.title
        yield _final_table(title, task, results.clock, width)


def overall_table(results: Results, width: int) -> RenderableType | None:
    """Geometric means of work to the target in units of a reference's, where there are several tasks and one."""
    found = overall(results)
    if len(results.tasks) < 2 or not found:
        return None
    title = f"{results.title}: work to target over the reference's, geometric means"
    rows = [(one.label, str(one.steps), str(one.seconds), f"{one.tasks - len(one.missed)} of {one.tasks}") for one in found]
    return drawn(title, ("entrant", "steps", _time(results.clock), "targets reached"), rows, width)


def _time(clock: Clock) -> str:
    return "CPU time" if clock == "cpu_seconds" else "time"


def _final_table(title: str, results: TaskResults, clock: Clock, width: int) -> RenderableType:
    metric = results.metric
    goal = f"{'training' if results.target.part == 'train' else 'validation'} loss {numbers.short(results.target.value)}"
    losses = ["training", *(["validation"] if results.held_out else []), "test", *([f"test {metric}"] if metric else [])]
    rows = []
    for row in table(results):
        label = row.label + (f" ({row.diverged} of {row.seeds} diverged)" if row.diverged else "")
        label += f" (failed: {row.error})" if row.error else ""
        cells = [label, numbers.short(row.lr), numbers.loss_spread(row.train_loss)]
        if results.held_out:
            cells.append(numbers.loss_spread(row.validation_loss))
        cells.append(numbers.loss_spread(row.test_loss))
        if metric:
            cells.append(numbers.metric_spread(row.test_metric, metric))
        reach = row.to_target
        cells += [
            numbers.short(reach["step"].median),
            numbers.short(reach["gradients"].median),
            numbers.seconds(reach[clock].median),
        ]
        rows.append(cells)
    title = f"{title}: final losses; steps, gradients and time to {goal}"
    return drawn(title, ("entrant", "lr", *losses, "steps", "gradients", _time(clock)), rows, width)
