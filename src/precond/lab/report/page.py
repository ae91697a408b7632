"""report.html: one self-contained page."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from precond.lab.report import numbers
from precond.lab.report.figures import WORK_LABELS, curves, profiles, searches
from precond.lab.report.overview import Cell, against, matrices
from precond.lab.report.pairs import Part, has_part, retargeted
from precond.lab.report.pooled import pooled
from precond.lab.report.ratios import ratios
from precond.lab.report.rendering import render_template
from precond.lab.report.results import Clock, Results, TaskResults
from precond.lab.report.style import Pen, pen
from precond.lab.report.summary import Row, Spread, Work, at_edge, table
from precond.lab.workloads import write_atomically


@dataclass(frozen=True)
class Bar:
    """Work to the target of one entrant: the median; how many seeds reached it, where not all did; then as percentages of the
    largest on the page the median and the seeds."""

    text: str
    reached: str
    width: float
    ticks: tuple[float, ...]


_UNITS: dict[Clock, str] = {"cpu_seconds": "CPU seconds", "seconds": "seconds"}


def render(results: Results) -> str:
    """The page, with styles and figures inside and nothing loaded from elsewhere; all text is escaped."""
    labels = list(dict.fromkeys(entry.label for task in results.tasks for entry in task.entries))
    pens = {label: pen(index) for index, label in enumerate(labels)}
    several = len(results.tasks) > 1
    sources = list(dict.fromkeys(task.facts.get("data", "") for task in results.tasks))
    return render_template(
        "report.html",
        results=results,
        several=several,
        legend=list(pens.items()),
        cards=[] if several else _cards(results.tasks[0], table(results.tasks[0]), results.clock),
        tasks=[_task(task, results.clock, pens, f"{number}-") for number, task in enumerate(results.tasks)],
        matrices=matrices(results, pens) if several else [],
        against=against(results, pens) if several else None,
        one_source=len(sources) == 1,
        lead=(sources if len(sources) == 1 else [*results.rules, ""])[0],
        profiles=_profiles(results, pens) if several else [],
        pooled=pooled(results),
        clock=WORK_LABELS[results.clock],
        settings={key: _setting(value) for key, value in results.settings.items()},
    )


def _profiles(results: Results, pens: Mapping[str, Pen]) -> list[tuple[str, list[Markup]]]:
    """What the target is, and figures: for targets on training and validation loss where there is a reference, else for the tasks' own."""
    works: tuple[Work, Work] = ("step", results.clock)
    parts: dict[Part, str] = {"train": "Training target", "validation": "Validation target"}
    aimed = {name: retargeted(results, part) for part, name in parts.items() if has_part(results, part)} or {"": results}
    return [
        (name, [Markup(profiles(one, pens, work, f"profile-{number}-{work}")) for work in works])
        for number, (name, one) in enumerate(aimed.items())
    ]


def save_page(path: Path, results: Results) -> None:
    """Write the page.

    Raises:
        WriteError: where it cannot be written.
    """
    write_atomically(path, render(results))


def _task(task: TaskResults, clock: Clock, pens: Mapping[str, Pen], prefix: str) -> dict[str, Any]:
    """What the template says of one task; figures are named by a prefix."""
    rows = table(task)
    final = _final(task, rows, clock)
    judge = (
        "on training examples that no curve is evaluated on, where there are enough of them"
        if task.judge == "training"
        else "on the validation part"
    )
    works: list[Work] = ["step", *(["gradients"] if task.probes else []), clock]  # type: ignore[list-item]
    return {
        "name": task.name,
        "facts": task.facts,
        "rows": [(row.label, pens[row.label], [column[i] for column in final.values()]) for i, row in enumerate(rows)],
        "columns": [heading.split(", ")[-1] for heading in final],
        "target": task.target,
        "reference": task.reference,
        "goal": numbers.short(task.target.value),
        "bars": _bars(rows, works, pens),
        "works": [WORK_LABELS[work] for work in works],
        "sections": _sections(task, works, pens, prefix),
        "searches": Markup(searches(task, pens, f"{prefix}searches")) if any(e.search for e in task.entries) else None,
        "spaces": [(e.label, f"{e.bounds[0]:g} to {e.bounds[1]:g}", len(e.search)) for e in task.entries if e.bounds],
        "edges": [entry.label for entry in task.entries if at_edge(entry)],
        "wins": f"the fewest steps to the lowest loss in the best trial of {task.reference}, {judge}, win, and among equals the lowest final "
        "loss, by which the reference itself is judged"
        if task.aim == "steps"
        else f"the lowest final loss {judge} wins",
        "diverged": [(row.label, row.diverged, row.seeds) for row in rows if row.diverged],
        "failed": [(row.label, row.error) for row in rows if row.error],
        "probes": task.probes,
        "seeds": [run.seed for run in task.entries[0].runs],
    }


def _sections(
    task: TaskResults, works: list[Work], pens: Mapping[str, Pen], prefix: str
) -> list[tuple[str, str, list[Markup]]]:
    """Heading, name and figures of each quantity."""
    parts = ("validation", "train") if task.held_out else ("train",)
    names = {"validation": "Validation", "train": "Training"}
    found = []
    for quantity in ("loss", "metric") if task.metric else ("loss",):
        for part in parts:
            heading, column = f"{names[part]} {task.metric if quantity == 'metric' else 'loss'}", f"{part}_{quantity}"
            figures = [Markup(curves(task, pens, column, work, f"{prefix}{column}-{work}")) for work in works]
            found.append((heading, column, figures))
    return found


def _final(results: TaskResults, rows: list[Row], clock: Clock) -> dict[str, list[Cell]]:
    """The final table, column by column. Beside ratios to a reference there is room for what differs alone."""

    def cells(of: Callable[[Row], Spread | None], text: Callable[[Spread | None], str], least: bool = True) -> list[Cell]:
        medians = [spread.median for row in rows if (spread := of(row)) is not None]
        top = math.nan if len(medians) < 2 else (min if least else max)(medians)
        return [Cell(text(spread := of(row)), spread is not None and spread.median == top) for row in rows]

    compared, tested = results.reference is not None, any(row.test_loss is not None for row in rows)
    columns = {"lr": [Cell(numbers.short(row.lr)) for row in rows]}
    if compared:
        columns |= _compared(results, rows, "step", "steps to target")
        columns |= _compared(results, rows, clock, f"{_UNITS[clock]} to target")
    columns["training loss"] = cells(lambda row: row.train_loss, numbers.loss_spread)
    if results.held_out:
        columns["validation loss"] = cells(lambda row: row.validation_loss, numbers.loss_spread)
    if tested and not (compared and results.metric):
        columns["test loss"] = cells(lambda row: row.test_loss, numbers.loss_spread)
    if tested and results.metric:
        name = results.metric
        columns[f"test {name}"] = cells(lambda row: row.test_metric, lambda s: numbers.metric_spread(s, name), least=False)
    if results.probes or not compared:
        columns["gradients"] = [
            Cell(numbers.NONE if s is None else numbers.short(s.median)) for s in (r.gradients for r in rows)
        ]
    times = [row.cpu_seconds if clock == "cpu_seconds" else row.seconds for row in rows]
    columns["time"] = [Cell(numbers.NONE if time is None else numbers.seconds(time.median)) for time in times]
    return columns


def _compared(results: TaskResults, rows: list[Row], work: Work, heading: str) -> dict[str, list[Cell]]:
    """Work to the target, and in units of the reference's."""
    medians, found = [row.to_target[work].median for row in rows], ratios(results, work)
    least = min(filter(math.isfinite, medians), default=math.nan)
    return {
        heading: [Cell(numbers.short(x), x == least) for x in medians],
        f"{heading}, ratio": [
            Cell(str(found.get(row.label, numbers.NONE)), x == least) for row, x in zip(rows, medians, strict=True)
        ],
    }


def _bars(rows: list[Row], works: list[Work], pens: Mapping[str, Pen]) -> list[tuple[str, Pen, list[Bar]]]:
    largest = {
        work: max((x for row in rows for x in row.to_target[work].seeds if math.isfinite(x)), default=1.0) for work in works
    }
    found = []
    for row in rows:
        bars = []
        for work in works:
            reach, scale = row.to_target[work], 100 / (largest[work] or 1.0)
            text = numbers.seconds(reach.median) if "seconds" in work else numbers.short(reach.median)
            reached = f"{reach.reached} of {len(reach.seeds)} seeds" if reach.reached < len(reach.seeds) else ""
            width = reach.median * scale if math.isfinite(reach.median) else 0.0
            bars.append(Bar(text, reached, width, tuple(x * scale for x in reach.seeds if math.isfinite(x))))
        found.append((row.label, pens[row.label], bars))
    return found


def _cards(results: TaskResults, rows: list[Row], clock: Clock) -> list[tuple[str, str, str]]:
    """What a reader wants to know first: heading, number, entrant."""
    cards = []
    tested = [(row.test_metric, row) for row in rows if row.test_metric is not None]
    if tested:
        spread, row = max(tested, key=lambda pair: pair[0].median)
        cards.append((f"Best test {results.metric}", numbers.metric_spread(spread, results.metric), row.label))
    losses = [(loss, row) for row in rows if (loss := row.test_loss or row.validation_loss or row.train_loss) is not None]
    if losses:
        lowest, row = min(losses, key=lambda pair: pair[0].median)
        part = "test" if row.test_loss else "validation" if row.validation_loss else "training"
        cards.append((f"Lowest {part} loss", numbers.loss_spread(lowest), row.label))
    headings: dict[Work, str] = {"gradients": "Fewest gradients to target", clock: "Least time to target"}
    for work, heading in headings.items():
        reached = [(row.to_target[work].median, row) for row in rows if math.isfinite(row.to_target[work].median)]
        if reached:
            amount, row = min(reached, key=lambda pair: pair[0])
            cards.append((heading, numbers.seconds(amount) if work == clock else numbers.short(amount), row.label))
    return cards


def _setting(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_setting, value))
    if value is None or isinstance(value, bool):
        return {None: "–", True: "yes", False: "no"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)
