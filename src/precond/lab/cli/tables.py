"""The final table on the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table
from rich.text import Text

from precond.lab.report import Clock, Results, TaskResults, numbers, overall, table


def final_tables(results: Results) -> Iterator[Table]:
    """Of each task: entrants, their losses after the last step, and the work to the target (medians over seeds)."""
    for task in results.tasks:
        title = f"{results.title}: {task.name}" if len(results.tasks) > 1 else results.title
        yield _final_table(title, task, results.clock)


def overall_table(results: Results) -> Table | None:
    """Geometric means of work to the target in units of a reference's, where there are several tasks and one."""
    found = overall(results)
    if len(results.tasks) < 2 or not found:
        return None
    drawn = Table(title=f"{results.title}: work to target over the reference's, geometric means", title_justify="left")
    drawn.add_column("entrant", overflow="fold")
    for heading in ("steps", "CPU time" if results.clock == "cpu_seconds" else "time", "targets reached"):
        drawn.add_column(heading, justify="right")
    for one in found:
        reached = f"{one.tasks - len(one.missed)} of {one.tasks}"
        drawn.add_row(*map(Text, (one.label, str(one.steps), str(one.seconds), reached)))
    return drawn


def _final_table(title: str, results: TaskResults, clock: Clock) -> Table:
    metric = results.metric
    goal = f"{'training' if results.target.part == 'train' else 'validation'} loss {numbers.short(results.target.value)}"
    drawn = Table(title=f"{title}: final losses; steps, gradients and time to {goal}", title_justify="left")
    drawn.add_column("entrant", overflow="fold")
    headings = ["lr", "training", *(["validation"] if results.held_out else []), "test"]
    for heading in (
        *headings,
        *([f"test {metric}"] if metric else []),
        "steps",
        "gradients",
        "CPU time" if clock == "cpu_seconds" else "time",
    ):
        drawn.add_column(heading, justify="right")
    for row in table(results):
        cells = [numbers.short(row.lr), numbers.loss_spread(row.train_loss)]
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
        label = row.label + (f" ({row.diverged} of {row.seeds} diverged)" if row.diverged else "")
        label += f" (failed: {row.error})" if row.error else ""
        drawn.add_row(Text(label), *map(Text, cells))
    return drawn
