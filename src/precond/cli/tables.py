"""The final table on the terminal."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from precond.report import Results, Row, numbers


def final_table(results: Results, rows: list[Row]) -> Table:
    """Entrants, their losses after the last step, and the work to the target (medians over seeds)."""
    metric = results.metric
    goal = f"{results.target.part} loss {numbers.short(results.target.value)}"
    drawn = Table(title=f"{results.title}: final losses; steps, gradients and time to {goal}", title_justify="left")
    drawn.add_column("entrant", overflow="fold")
    headings = ["lr", "training", *(["validation"] if results.held_out else []), "test"]
    for heading in (*headings, *([f"test {metric}"] if metric else []), "steps", "gradients", "time"):
        drawn.add_column(heading, justify="right")
    for row in rows:
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
            numbers.seconds(reach["seconds"].median),
        ]
        label = row.label + (f" ({row.diverged} of {row.seeds} diverged)" if row.diverged else "")
        drawn.add_row(Text(label), *map(Text, cells))
    return drawn
