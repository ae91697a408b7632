"""How much a learning rate matters: beside the best one, in losses and in steps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

from precond.lab.report import numbers
from precond.lab.report.plain import PlainTable, mean, reference
from precond.lab.report.ratios import Ratio, geometric_mean
from precond.lab.report.results import Entry, Results, TaskResults
from precond.lab.workloads import Trial

_DIVERGED = 100.0


def rates(results: Results) -> list[PlainTable]:
    """Both tables; nothing where nothing was searched."""
    found = []
    if any(entry.search for task in results.tasks for entry in task.entries):
        found.append(_in_losses(results))
    if any(trial.steps for task in results.tasks for entry in task.entries for trial in entry.search):
        found.append(_in_steps(results))
    return found


def _in_losses(results: Results) -> PlainTable:
    families = list(dict.fromkeys(task.family or "all" for task in results.tasks))
    rows = []
    for label, of_label in _searches(results).items():
        searches = [(task.family or "all", entry) for task, entry in of_label]
        twice, half = (_neighbors([entry for _, entry in searches], factor) for factor in (2.0, 0.5))
        shared = []
        for family in families:
            shared += _with_one_rate([_losses(entry) for kind, entry in searches if kind == family])
        cells = [_summed(found) for found in (twice, half, shared)]
        chosen = [entry.lr for _, entry in searches]
        rows.append([label, *cells, f"{numbers.short(min(chosen))} to {numbers.short(max(chosen))}"])
    return PlainTable(
        "Learning rates: the final loss of trials, times that of the best one",
        "At twice and at half the rate of the lowest final loss of each task, and with one rate for all tasks of a family, the one with "
        "the lowest mean of these ratios: geometric means, medians in parentheses, and in how many tasks the loss is at most 10 % higher. A "
        "trial that diverged counts as 100 times the best. Only rates that were tried count; of one seed. A loss that goes to 0 has no "
        "scale: one such task may be most of a mean.",
        ["entrant", "at twice the rate", "at half the rate", "one rate for each family", "rates chosen"],
        rows,
    )


def _summed(found: Sequence[float]) -> str:
    middle = f" ({numbers.short(statistics.median(found))})" if found else ""
    return f"{mean(found)}{middle}, {sum(x <= 1.1 for x in found)} of {len(found)}"


def _in_steps(results: Results) -> PlainTable:
    ref = reference(results)
    rows = []
    for label, searches in _searches(results).items():
        cells = []
        for factor in (0.5, 2.0):
            ratios = [r for task, entry in searches if (r := _off(task, entry, factor)) is not None]
            reached = f", {sum(r.reached for r in ratios)} of {len(ratios)}" if ratios else ""
            cells.append(f"{geometric_mean(ratios)}{reached}")
        units = [geometric_mean([r for task, e in searches if (r := _of_unit(task, e, f))]) for f in (0.5, 1.0, 2.0)]
        known = any(math.isfinite(unit.value) for unit in units)
        rows.append([label, *cells, " / ".join(map(str, units)) if known else numbers.NONE])
    return PlainTable(
        f"Steps beside the best learning rate: to the lowest loss in the best trial of {ref}",
        f"At half and at twice the rate that was chosen, that of the fewest steps ({ref}'s is that of its lowest final loss): times the steps "
        f"at that rate, and in how many tasks the loss was reached at all; then in units of the steps that {ref} takes to it at its own. "
        "Geometric means over the tasks in which the rate was tried and the chosen one reached the loss; > is a lower bound: a trial that "
        "missed it counts with all of its steps. Of one seed, and 20 evaluations of a training.",
        ["entrant", "at half the rate", "at twice the rate", f"of {ref}'s steps: half / best / twice"],
        rows,
    )


def _searches(results: Results) -> Mapping[str, Sequence[tuple[TaskResults, Entry]]]:
    """Of each entrant: tasks, and its searches in them."""
    found: dict[str, list[tuple[TaskResults, Entry]]] = {}
    for task in results.tasks:
        for entry in task.entries:
            found.setdefault(entry.label, []).append((task, entry))
    return found


def _losses(entry: Entry) -> dict[float, float]:
    """Rate ↦ final loss over the lowest, of all trials; empty where none has a loss above 0."""
    lowest = min((t.loss for t in entry.search if math.isfinite(t.loss)), default=math.nan)
    if not lowest > 0:
        return {}
    return {t.lr: t.loss / lowest if math.isfinite(t.loss) else _DIVERGED for t in entry.search}


def _neighbors(entries: Iterable[Entry], factor: float) -> list[float]:
    """Of each search the ratio at ``factor`` times its best rate, where that was tried."""
    found = []
    for ratios in map(_losses, entries):
        if ratios:
            wanted = factor * min(ratios, key=lambda lr: ratios[lr])
            found += [x for lr, x in ratios.items() if _same(lr, wanted)]
    return found


def _same(lr: float, wanted: float) -> bool:
    """Rates have four digits."""
    return abs(lr / wanted - 1) < 2e-3


def _with_one_rate(searches: Sequence[dict[float, float]]) -> list[float]:
    """Of each the ratio at the rate that all tried with the lowest geometric mean."""
    kept = [ratios for ratios in searches if ratios]
    common = set.intersection(*(set(ratios) for ratios in kept)) if kept else set()
    if not common:
        return []
    rate = min(sorted(common), key=lambda lr: sum(math.log(ratios[lr]) for ratios in kept))
    return [ratios[rate] for ratios in kept]


def _at(entry: Entry, factor: float) -> Trial | None:
    """The trial at ``factor`` times the rate that was chosen, where that was tried."""
    return next((trial for trial in entry.search if _same(trial.lr, factor * entry.lr)), None)


def _steps(task: TaskResults, trial: Trial) -> Ratio:
    """To the loss; of a trial that missed it, all that a training has."""
    whole = max((run.curve.step[-1] for entry in task.entries for run in entry.runs if run.curve.step), default=0)
    return Ratio(float(whole), False) if trial.steps is None else Ratio(float(trial.steps), True)


def _over(task: TaskResults, trial: Trial | None, unit: Trial | None) -> Ratio | None:
    if trial is None or unit is None or not unit.steps:
        return None
    work = _steps(task, trial)
    return Ratio(work.value / unit.steps, work.reached)


def _off(task: TaskResults, entry: Entry, factor: float) -> Ratio | None:
    """Steps at ``factor`` times the chosen rate over those at that; None where either is not known."""
    return _over(task, _at(entry, factor), _at(entry, 1.0))


def _of_unit(task: TaskResults, entry: Entry, factor: float) -> Ratio | None:
    """Steps at ``factor`` times the chosen rate over those of the reference at its own."""
    own = next((e for e in task.entries if e.label == task.reference), None)
    return _over(task, _at(entry, factor), None if own is None else _at(own, 1.0))
