"""One picture of many tasks: work to the reference's loss, by family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from matplotlib.axes import Axes

from precond.lab.report.ratios import Overall, overall
from precond.lab.report.results import Results
from precond.lab.report.style import log_axis, pen, svg_file, svg_panels

_WORK = ("steps", "seconds")


def by_family(results: Results, labels: Sequence[str] = ()) -> dict[str, list[Overall]]:
    """Geometric means of each family's ratios, and of all tasks as the last row; entrants as named, all of them by default."""
    names = list(dict.fromkeys(task.family or "other" for task in results.tasks))
    parts = {name: tuple(t for t in results.tasks if (t.family or "other") == name) for name in names}
    found = {f"{name} ({len(tasks)})": overall(replace(results, tasks=tasks)) for name, tasks in parts.items()}
    found[f"all tasks ({len(results.tasks)})"] = overall(results)
    return {name: [one for one in means if not labels or one.label in labels] for name, means in found.items()}


def families_figure(results: Results, labels: Sequence[str] = ()) -> str:
    """Steps and seconds to the reference's loss by family, the reference's being 1: a complete SVG file.

    An open mark is a lower bound: most seeds of some task missed its loss.

    Args:
        results: of several tasks with families and one reference.
        labels: which entrants; all but the reference by default.

    Raises:
        ValueError: where no task has a reference that reached its own loss, or an entrant is not among the results.
    """
    reference = next((task.reference for task in results.tasks if task.reference), None)
    known = dict.fromkeys(entry.label for task in results.tasks for entry in task.entries)
    if unknown := [label for label in labels if label not in known]:
        raise ValueError(f"labels: no entrant is called {unknown[0]!r}; there are {', '.join(map(repr, known))}")
    chosen = [label for label in (labels or known) if label != reference]
    rows = by_family(results, chosen)
    if reference is None or not any(rows.values()):
        raise ValueError("the results have no reference that reached its own loss, in units of which work is drawn")
    pens = {label: pen(k) for k, label in enumerate(reversed(chosen))}

    def draw(panels: Sequence[Axes]) -> None:
        for axes, work in zip(panels, _WORK, strict=True):
            for y, means in enumerate(rows.values()):
                ratios = {one.label: getattr(one, work) for one in means}
                axes.axhline(y, color="#e4e7eb", linewidth=0.8, zorder=1)
                for label, ratio in ratios.items():
                    color = pens[label].color
                    axes.plot(
                        ratio.value, y, "o", color=color, mfc=color if ratio.reached else "white", mew=1.5, ms=7, zorder=3
                    )
            axes.axvline(1, color="#616e7c", linewidth=1, zorder=2)
            axes.set_xscale("log")
            axes.grid(axis="y", visible=False)
            log_axis(axes.xaxis)
            axes.set_title(f"{work} (of {reference}'s)", fontsize=10, loc="left")
        panels[0].set_yticks(range(len(rows)), list(rows))
        panels[0].invert_yaxis()
        for label in chosen:
            panels[0].plot([], [], "o", color=pens[label].color, ms=7, label=label)
        handles, names = panels[0].get_legend_handles_labels()
        panels[0].figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)

    return svg_file(svg_panels(draw, "families", (8.2, 3.9), 2, "white"))
