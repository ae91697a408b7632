"""Whether a learning rate transfers over widths and depths: tables and figures of best rates."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes

from precond.lab.report import numbers
from precond.lab.report.ratios import markdown_row
from precond.lab.report.results import Results
from precond.lab.report.style import log_axis, pen, svg, svg_file
from precond.lab.workloads import Trial
from precond.lab.workloads.transfer import DEPTHS, WIDTHS, best_rate, mean_losses, shape_name

_LINES = {
    "width": {w: shape_name(w, DEPTHS[0]) for w in WIDTHS},
    "width, spectral head": {w: shape_name(w, DEPTHS[0], True) for w in WIDTHS},
    "depth": {d: shape_name(128, d) for d in DEPTHS},
}
"""What is on the abscissa ↦ its values and the names of their tasks."""


def rates(results: Results, along: str) -> dict[str, dict[int, float]]:
    """Entrant ↦ width or depth ↦ best rate, of those that are there."""
    found: dict[str, dict[int, float]] = {}
    for value, name in _LINES[along].items():
        tasks = [task for task in results.tasks if task.name.startswith(f"{name}, seed")]
        for label in dict.fromkeys(entry.label for task in tasks for entry in task.entries):
            found.setdefault(label, {})[value] = best_rate(searches(results, name, label))
    return found


def searches(results: Results, name: str, label: str) -> list[tuple[Trial, ...]]:
    """Of an entrant, one for each seed, at a width and depth."""
    tasks = [task for task in results.tasks if task.name.startswith(f"{name}, seed")]
    return [entry.search for task in tasks for entry in task.entries if entry.label == label]


def shared_rate(places: Sequence[Sequence[Sequence[Trial]]]) -> tuple[float, float]:
    """The rate with the lowest geometric mean over places of the loss over the lowest there, losses being means over seeds, and that mean."""
    found = [mean_losses(seeds) for seeds in places]
    common = set.intersection(*map(set, found)) if found else set()
    if not common:
        return math.nan, math.nan
    means = {lr: math.exp(statistics.fmean(math.log(losses[lr] / min(losses.values())) for losses in found)) for lr in common}
    rate = min(sorted(means), key=lambda lr: means[lr])
    return rate, means[rate]


def spread(values: Iterable[float]) -> float:
    """The largest over the smallest; NaN where there is none."""
    kept = [x for x in values if math.isfinite(x)]
    return max(kept) / min(kept) if kept else math.nan


def transfer_markdown(results: Results) -> str:
    """Best rates, and by how much they move."""
    parts = ["# Whether the learning rate transfers\n", f"`{results.command}`\n"]
    for along, places in _LINES.items():
        found = rates(results, along)
        present = [value for value in places if any(value in of for of in found.values())]
        head = [
            "entrant",
            *(f"{along.split(',')[0]} {value}" for value in present),
            "largest / smallest",
            "one rate for all",
            "its loss over the best",
        ]
        lines = [markdown_row(head), f"|---|{'---:|' * (len(head) - 1)}"]
        for label, of in found.items():
            cells = [numbers.short(of.get(value, math.nan)) for value in present]
            rate, loss = shared_rate([searches(results, places[value], label) for value in present])
            lines.append(markdown_row([label, *cells, *map(numbers.short, (spread(of.values()), rate, loss))]))
        parts += [f"## Best rate over the {along}\n", "\n".join(lines) + "\n"]
    return "\n".join(parts)


def transfer_figure(results: Results, along: str) -> str:
    """Best rate over widths or depths, both logarithmic: a complete SVG file."""
    found = rates(results, along)

    def draw(axes: Axes) -> None:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        for number, (label, of) in enumerate(found.items()):
            axes.plot(list(of), list(of.values()), marker="o", markersize=4, color=pen(number).color, label=label)
        axes.set_xticks(list(_LINES[along]), [str(value) for value in _LINES[along]])
        log_axis(axes.yaxis)
        axes.set_xlabel(along)
        axes.set_ylabel("best learning rate")
        axes.legend(frameon=False, fontsize=8)

    return svg_file(svg(draw, f"transfer-{along}", (5.2, 3.4)))
