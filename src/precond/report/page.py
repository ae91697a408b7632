"""report.html: one self-contained page."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from precond.report import numbers
from precond.report.figures import WORK_LABELS, curves, searches
from precond.report.results import Results
from precond.report.style import Pen, pen
from precond.report.summary import WORKS, Row, Spread, Work, at_edge, table
from precond.workloads import write_atomically


@dataclass(frozen=True)
class Cell:
    """A number in the final table, and whether it is the best of its column."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Bar:
    """Work to the target of one entrant: the median; how many seeds reached it, where not all did; then as percentages of the
    largest on the page the median and the seeds."""

    text: str
    reached: str
    width: float
    ticks: tuple[float, ...]


def render(results: Results) -> str:
    """The page, with styles and figures inside and nothing loaded from elsewhere; all text is escaped."""
    environment = Environment(
        loader=PackageLoader("precond.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    rows = table(results)
    works: list[Work] = [work for work in WORKS if work != "gradients" or results.probes]
    return environment.get_template("report.html").render(
        results=results,
        style=Markup((Path(__file__).parent / "templates" / "report.css").read_text(encoding="utf-8")),
        legend=[(entry.label, pen(index)) for index, entry in enumerate(results.entries)],
        cards=_cards(results, rows),
        rows=_rows(results, rows),
        columns=_columns(results),
        target=numbers.short(results.target.value),
        bars=_bars(rows, works),
        works=[WORK_LABELS[work] for work in works],
        sections=_sections(results, works),
        searches=Markup(searches(results)) if any(entry.search for entry in results.entries) else None,
        edges=[entry.label for entry in results.entries if at_edge(entry)],
        diverged=[(row.label, row.diverged, row.seeds) for row in rows if row.diverged],
        seeds=[run.seed for run in results.entries[0].runs],
        settings={key: _setting(value) for key, value in results.settings.items()},
    )


def save_page(path: Path, results: Results) -> None:
    """Write the page.

    Raises:
        WriteError: where it cannot be written.
    """
    write_atomically(path, render(results).encode())


def _sections(results: Results, works: list[Work]) -> list[tuple[str, str, list[Markup]]]:
    """Heading, explanation and figures of each quantity."""
    parts = ("validation", "train") if results.held_out else ("train",)
    names = {"validation": "Validation", "train": "Training"}
    found = []
    for quantity in ("loss", "metric") if results.metric else ("loss",):
        for part in parts:
            heading = f"{names[part]} {results.metric if quantity == 'metric' else 'loss'}"
            figures = [Markup(curves(results, f"{part}_{quantity}", work)) for work in works]
            found.append((heading, f"{part}_{quantity}", figures))
    return found


def _columns(results: Results) -> list[str]:
    held_out = ["validation loss"] if results.held_out else []
    tested = ["test loss"] + ([f"test {results.metric}"] if results.metric else [])
    return ["lr", "training loss", *held_out, *(tested if _tested(results) else []), "gradients", "time"]


def _tested(results: Results) -> bool:
    return any(run.test_loss is not None for entry in results.entries for run in entry.runs)


def _rows(results: Results, rows: list[Row]) -> list[tuple[str, Pen, list[Cell]]]:
    def best(of: Callable[[Row], Spread | None], least: bool = True) -> float:
        means = [spread.mean for row in rows if (spread := of(row)) is not None]
        return math.nan if len(means) < 2 else (min if least else max)(means)

    def cells(of: Callable[[Row], Spread | None], text: Callable[[Spread | None], str], least: bool = True) -> list[Cell]:
        top = best(of, least)
        return [Cell(text(spread := of(row)), spread is not None and spread.mean == top) for row in rows]

    columns = [
        [Cell(numbers.short(row.lr)) for row in rows],
        cells(lambda row: row.train_loss, numbers.loss_spread),
    ]
    if results.held_out:
        columns.append(cells(lambda row: row.validation_loss, numbers.loss_spread))
    if _tested(results):
        columns.append(cells(lambda row: row.test_loss, numbers.loss_spread))
        if results.metric:
            columns.append(cells(lambda row: row.test_metric, lambda s: numbers.metric_spread(s, results.metric), least=False))
    columns.append([Cell(numbers.NONE if row.gradients is None else numbers.short(row.gradients.mean)) for row in rows])
    columns.append([Cell(numbers.NONE if row.seconds is None else numbers.seconds(row.seconds.mean)) for row in rows])
    return [(row.label, pen(i), [column[i] for column in columns]) for i, row in enumerate(rows)]


def _bars(rows: list[Row], works: list[Work]) -> list[tuple[str, Pen, list[Bar]]]:
    largest = {
        work: max((x for row in rows for x in row.to_target[work].seeds if math.isfinite(x)), default=1.0) for work in works
    }
    found = []
    for index, row in enumerate(rows):
        bars = []
        for work in works:
            reach, scale = row.to_target[work], 100 / (largest[work] or 1.0)
            text = numbers.seconds(reach.median) if work == "seconds" else numbers.short(reach.median)
            reached = f"{reach.reached} of {len(reach.seeds)} seeds" if reach.reached < len(reach.seeds) else ""
            width = reach.median * scale if math.isfinite(reach.median) else 0.0
            bars.append(Bar(text, reached, width, tuple(x * scale for x in reach.seeds if math.isfinite(x))))
        found.append((row.label, pen(index), bars))
    return found


def _cards(results: Results, rows: list[Row]) -> list[tuple[str, str, str]]:
    """What a reader wants to know first: heading, number, entrant."""
    cards = []
    tested = [(row.test_metric, row) for row in rows if row.test_metric is not None]
    if tested:
        spread, row = max(tested, key=lambda pair: pair[0].mean)
        cards.append((f"Best test {results.metric}", numbers.metric_spread(spread, results.metric), row.label))
    losses = [(loss, row) for row in rows if (loss := row.test_loss or row.validation_loss or row.train_loss) is not None]
    if losses:
        lowest, row = min(losses, key=lambda pair: pair[0].mean)
        part = "test" if row.test_loss else "validation" if row.validation_loss else "training"
        cards.append((f"Lowest {part} loss", numbers.loss_spread(lowest), row.label))
    headings: dict[Work, str] = {"gradients": "Fewest gradients to target", "seconds": "Least time to target"}
    for work, heading in headings.items():
        reached = [(row.to_target[work].median, row) for row in rows if math.isfinite(row.to_target[work].median)]
        if reached:
            amount, row = min(reached, key=lambda pair: pair[0])
            cards.append((heading, numbers.seconds(amount) if work == "seconds" else numbers.short(amount), row.label))
    return cards


def _setting(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_setting, value))
    if value is None or isinstance(value, bool):
        return {None: "–", True: "yes", False: "no"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)
