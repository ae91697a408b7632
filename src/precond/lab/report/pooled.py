"""What a page says of many tasks of several kinds: both targets, families, pairs of entrants, and how much a learning rate matters."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

from precond.lab.report import numbers
from precond.lab.report.pairs import Pair, Part, has_part, pairs, retargeted
from precond.lab.report.plain import PlainTable, mean, reference
from precond.lab.report.rates import rates
from precond.lab.report.ratios import Overall, overall
from precond.lab.report.results import Results, TaskResults
from precond.lab.report.summary import profile, table

_PARTS: dict[Part, str] = {"train": "training", "validation": "validation"}


def pooled(results: Results) -> list[PlainTable]:
    """All tables; nothing where there is no reference or one task alone."""
    parts = [part for part in _PARTS if has_part(results, part)]
    if len(results.tasks) < 2 or not parts:
        return []
    found = [_targets(results, parts)]
    if any(task.family for task in results.tasks):
        found += [_families(results, part) for part in parts]
    if "validation" in parts:
        found.append(_ends(results))
    found += [_pairs(results, part) for part in parts]
    found += [_profiles(results, part) for part in parts]
    return [*found, *rates(results)]


def _targets(results: Results, parts: Sequence[Part]) -> PlainTable:
    means: dict[Part, dict[str, Overall]] = {part: {m.label: m for m in overall(retargeted(results, part))} for part in parts}
    labels = list(dict.fromkeys(label for found in means.values() for label in found))
    rows = []
    for label in labels:
        cells = [label]
        for part in parts:
            one = means[part].get(label)
            found = [r for task in retargeted(results, part).tasks for r in table(task) if r.label == label]
            reached = f"{sum(r.to_target['step'].reached for r in found)} of {sum(r.seeds for r in found)}"
            cells += [numbers.NONE] * 3 if one is None else [str(one.steps), str(one.seconds), reached]
        rows.append(cells)
    heads = [f"{_PARTS[part]} target: {what}" for part in parts for what in ("steps", "seconds", "trainings that reached it")]
    return PlainTable(
        f"Both targets, times the work of {reference(results)}",
        "Geometric means over tasks of the ratios of medians over seeds; > is a lower bound: where most seeds of a task missed its target, "
        "the work of the whole training counts. Targets are the lowest losses on the reference's curves, medians over seeds, so that it "
        "misses them with some of its own.",
        ["entrant", *heads],
        rows,
    )  # fmt: skip


def _families(results: Results, part: Part) -> PlainTable:
    aimed = retargeted(results, part)
    families = list(dict.fromkeys(task.family or "other" for task in aimed.tasks))
    labels = list(dict.fromkeys(entry.label for task in aimed.tasks for entry in task.entries))
    rows = []
    for family in families:
        of_family = replace(aimed, tasks=tuple(task for task in aimed.tasks if (task.family or "other") == family))
        means = {one.label: one for one in overall(of_family)}
        cells = (f"{means[label].steps} / {means[label].seconds}" if label in means else numbers.NONE for label in labels)
        rows.append([f"{family} ({len(of_family.tasks)})", *cells])
    return PlainTable(
        f"Families: steps / seconds to the {_PARTS[part]} target, times those of {reference(results)}",
        "Geometric means over the tasks of a family, whose number is in parentheses.",
        ["family", *labels],
        rows,
    )


def _ends(results: Results) -> PlainTable:
    """Validation at the end and at its best, in units of the reference's best."""
    aimed = retargeted(results, "validation")
    labels = list(dict.fromkeys(entry.label for task in aimed.tasks for entry in task.entries))
    of_runs: dict[str, Callable[[Sequence[float]], float]] = {"best": min, "last": lambda losses: losses[-1]}
    rows = []
    for label in labels:
        cells = [label]
        for of in of_runs.values():
            found = {task.name: _over(task, label, of) for task in aimed.tasks}
            kept = {name: x for name, x in found.items() if math.isfinite(x) and x > 0}
            worst = max(kept, key=lambda name: kept[name], default="")
            cells += [mean(kept.values()), f"{numbers.short(kept[worst])} ({worst})" if worst else numbers.NONE]
        rows.append(cells)
    heads = [f"{what}: {which}" for what in of_runs for which in ("geometric mean", "largest (task)")]
    return PlainTable(
        f"Validation loss, times the best of {reference(results)}",
        "Of each task the median over seeds, at the best evaluation of a curve and at the last one; above 1 is worse.",
        ["entrant", *heads],
        rows,
    )  # fmt: skip


def _over(task: TaskResults, label: str, of: Callable[[Sequence[float]], float]) -> float:
    entry = next((e for e in task.entries if e.label == label), None)
    found = [of(run.curve.validation_loss) for run in entry.runs if run.status == "finished"] if entry else []
    return statistics.median(found) / task.target.value if found and task.target.value > 0 else math.nan


def _pairs(results: Results, part: Part) -> PlainTable:
    steps, seconds = (pairs(results, part, work) for work in ("step", results.clock))

    def one(pair: Pair) -> str:
        return f"{numbers.short(pair.ratio)} ({numbers.short(pair.low)} to {numbers.short(pair.high)})"

    rows = [
        [f"{a.label} against {a.rival}", one(a), one(b), f"{a.faster} / {a.slower} of {a.tasks}", _p(a.wilcoxon), _p(a.sign)]
        for a, b in zip(steps, seconds, strict=True)
    ]
    return PlainTable(
        f"Pairs: work to the {_PARTS[part]} target",
        "Geometric means over tasks of ratios seed by seed, with bootstrap intervals of 95 % (tasks and their seeds drawn anew); a training "
        "that missed the target counts with all of its work. Tests are over tasks, two-sided, on steps, and not corrected for how many "
        "pairs there are. Of more than eight entrants, pairs with the reference alone.",
        ["pair", "steps", "seconds", "faster / slower", "Wilcoxon p", "sign test p"],
        rows,
    )  # fmt: skip


_FACTORS = (1.0, 1.25, 1.5, 2.0, 4.0)


def _profiles(results: Results, part: Part) -> PlainTable:
    """Performance profiles (Dolan & Moré, 2002) of steps, at some ratios."""
    found = profile(retargeted(results, part), "step")
    rows = [
        [label, *(f"{sum(x <= factor for x in ratios)} of {len(ratios)}" for factor in _FACTORS)]
        for label, ratios in found.items()
    ]
    return PlainTable(
        f"Profiles: steps to the {_PARTS[part]} target, times the least of any entrant",
        "In how many tasks an entrant took at most so many times the steps of the one that took the least (Dolan & Moré, 2002); a target "
        "that most of its seeds missed counts in none.",
        ["entrant", *(f"≤ {numbers.short(factor)}" for factor in _FACTORS)],
        rows,
    )


def _p(value: float) -> str:
    return numbers.NONE if math.isnan(value) else f"{value:.2g}"
