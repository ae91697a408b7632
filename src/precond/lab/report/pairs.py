"""Entrants pair by pair, over tasks and seeds, with intervals and tests: is one of them faster, or was it luck?"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from precond.lab.report.results import Results, TaskResults
from precond.lab.report.summary import Work, default_target, work_to_target
from precond.lab.workloads import Outcome

Part = Literal["train", "validation"]

_MANY = 8
_RESAMPLES = 2000
_LEVEL = 0.95


@dataclass(frozen=True)
class Pair:
    r"""How much work an entrant needs, in units of a rival's, over tasks.

    Of each seed of a task, xₛ = ln(w/w′), w and w′ the work of both to the target with this seed; where a target was not reached the work
    of the whole training counts, so that two that both miss it are equal, and the ratio to one that misses is too near to 1. A task counts
    as the mean of its xₛ.

    Attributes:
        label, rival: of both.
        part: of the data on which the target's loss is.
        ratio: exp of the mean over tasks.
        low, high: of it, a bootstrap interval of 95 %: tasks are drawn with replacement, and of each its seeds.
        wilcoxon, sign: p of the two-sided signed-rank test (Wilcoxon, 1945) and of the sign test over tasks, which are independent; seeds of one
            task are not. NaN where no task differs.
        faster, slower: number of tasks.
        tasks: of both, and as many as there are.
    """

    label: str
    rival: str
    part: Part
    ratio: float
    low: float
    high: float
    wilcoxon: float
    sign: float
    faster: int
    slower: int
    tasks: int


def retargeted(results: Results, part: Part) -> Results:
    """The same with the reference's best loss on a part as each task's target; tasks without that part are left out.

    Raises:
        ValueError: where no task is left.
    """
    tasks = tuple(
        replace(task, target=default_target(task.entries, task.reference, 0.0, part))
        for task in results.tasks
        if task.reference and (part == "train" or task.held_out)
    )
    return replace(results, tasks=tasks)


def has_part(results: Results, part: Part) -> bool:
    """Whether some task with a reference has it."""
    return any(task.reference and (part == "train" or task.held_out) for task in results.tasks)


def pairs(results: Results, part: Part, work: Work) -> list[Pair]:
    """Each entrant against those that were named before it; of more than eight, against references alone."""
    tasks = retargeted(results, part).tasks
    labels = list(dict.fromkeys(entry.label for task in tasks for entry in task.entries))
    references = {task.reference for task in tasks}
    chosen = [
        (label, rival)
        for i, label in enumerate(labels)
        for rival in (labels[:i] if len(labels) <= _MANY else labels)
        if label != rival and (len(labels) <= _MANY or rival in references)
    ]
    return [_pair(label, rival, part, tasks, work) for label, rival in chosen]


def log_ratios(task: TaskResults, label: str, rival: str, work: Work) -> list[float]:
    """ln(w/w′) of each seed that both were trained with; nothing where one of them made no step or takes no part."""
    runs = {entry.label: {run.seed: run for run in entry.runs if run.curve.step[-1:] > [0]} for entry in task.entries}
    ours, theirs = runs.get(label, {}), runs.get(rival, {})
    length = max((run.curve.step[-1] for of_entrant in runs.values() for run in of_entrant.values()), default=0)
    found = []
    for seed in sorted(ours.keys() & theirs.keys()):
        w, v = (_work(run, task, work, length) for run in (ours[seed], theirs[seed]))
        if w > 0 and v > 0:
            found.append(math.log(w / v))
    return found


def _work(run: Outcome, task: TaskResults, work: Work, length: int) -> float:
    """To the target, or of a whole training at this one's pace."""
    reached = work_to_target(run, task.target, work)
    return float(run.curve.columns()[work][-1] * length / run.curve.step[-1]) if math.isnan(reached) else reached


def _pair(label: str, rival: str, part: Part, tasks: Sequence[TaskResults], work: Work) -> Pair:
    found = [x for task in tasks if (x := log_ratios(task, label, rival, work))]
    means = [statistics.fmean(x) for x in found]
    low, high = interval(found)
    differ = [x for x in means if abs(x) > 1e-12]
    faster = sum(x < 0 for x in differ)
    ratio = math.exp(statistics.fmean(means)) if means else math.nan
    return Pair(
        label, rival, part, ratio, low, high, _wilcoxon(differ), _sign(faster, len(differ)), faster, len(differ) - faster, len(means)
    )  # fmt: skip


def interval(found: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Of the mean over tasks of the means over seeds, after exp: tasks and their seeds are drawn anew, always by the same random numbers.

    Example:
        >>> interval([[0.0, 0.0], [0.0]])
        (1.0, 1.0)
    """
    if not found:
        return math.nan, math.nan
    random = np.random.default_rng(0)
    sizes = np.array([len(seeds) for seeds in found])
    padded = np.array([[*seeds, *[0.0] * (sizes.max() - len(seeds))] for seeds in found])
    tasks = random.integers(len(found), size=(_RESAMPLES, len(found)))
    # As many seeds of each task that is drawn as it has, anew each time that it is drawn.
    seeds = (random.random((*tasks.shape, padded.shape[1])) * sizes[tasks, None]).astype(int)
    drawn = np.arange(padded.shape[1]) < sizes[tasks, None]
    means = ((padded[tasks[..., None], seeds] * drawn).sum(2) / sizes[tasks]).mean(1)
    low, high = np.quantile(means, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(np.exp(low)), float(np.exp(high))


def _wilcoxon(differ: Sequence[float]) -> float:
    if not differ:
        return math.nan
    from scipy.stats import wilcoxon

    return float(wilcoxon(differ).pvalue)


def _sign(faster: int, differ: int) -> float:
    if not differ:
        return math.nan
    from scipy.stats import binomtest

    return float(binomtest(faster, differ).pvalue)
