"""``auto`` as it is now on a table of the pool that was made before: the same tasks, rates and seeds, and AdamW beside it for the seconds.

    python benchmarks/again.py [--half sealed] [--rounds 3]

Nothing is searched, and the tasks were known by now: it shows what has become of a table, and is none. A cell is steps / seconds to the
training target, then to the validation target, of the file, over those of AdamW; medians over seeds, a miss counted with all of the training.
Seconds are the processor's, medians of some rounds through both.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from precond.lab.report.numbers import short
from precond.lab.report.pairs import Part, retargeted
from precond.lab.report.results import Results, load_results
from precond.lab.workloads.curve import Curve
from precond.lab.workloads.pool.tasks import REFERENCE, pool_tasks
from precond.lab.workloads.study import Contender, Task
from precond.lab.workloads.training import train

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
COLUMNS: Mapping[Part, str] = {"train": "train_loss", "validation": "validation_loss"}
Work = tuple[float, float]
"""Steps and seconds."""


def rates(results: Results, task: str) -> dict[tuple[str, int], float]:
    """By label and seed, as they were searched."""
    (of,) = (t for t in results.tasks if t.name == task)
    return {(entry.label, run.seed): run.lr for entry in of.entries for run in entry.runs}


def curves(task: Task, contender: Contender, rate: Mapping[tuple[str, int], float], rounds: int) -> list[Curve]:
    """Of each seed, with the median of its rounds for the seconds."""
    found = []
    for seed in task.seeds:
        plan = replace(task.plan, lr=rate[contender.label, seed], seed=seed, test=False)
        each = [train(contender.workload(), contender.entrant, plan)[0].curve for _ in range(rounds)]
        each[0].cpu_seconds[:] = [statistics.median(at) for at in zip(*(c.cpu_seconds for c in each), strict=True)]
        found.append(each[0])
    return found


def work(curve: Curve, part: Part, target: float) -> Work:
    """To the first evaluation that meets a target; ∞ where none does."""
    met = (i for i, loss in enumerate(getattr(curve, COLUMNS[part])) if loss <= target)
    i = next(met, None)
    return (math.inf, math.inf) if i is None else (curve.step[i], curve.cpu_seconds[i])


def over(ours: list[Curve], theirs: list[Curve], part: Part, target: float) -> tuple[Work, int]:
    """Ratios of medians, and how many of ours met the target."""
    works = [[work(c, part, target) for c in of] for of in (ours, theirs)]
    middle = [[statistics.median_high(column) for column in zip(*of, strict=True)] for of in works]
    last = [(of[0].step[-1], statistics.median(x.cpu_seconds[-1] for x in of)) for of in (ours, theirs)]
    (a, b), (c, d) = (
        [x if math.isfinite(x) else end for x, end in zip(m, e, strict=True)] for m, e in zip(middle, last, strict=True)
    )
    return (a / c, b / d), sum(math.isfinite(steps) for steps, _ in works[0])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--half", default="sealed")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = load_results(EXPERIMENTS / f"pool-{options.half}" / "results.json")
    settings: Any = results.settings
    aimed = {part: {t.name: t.target.value for t in retargeted(results, part).tasks} for part in COLUMNS}
    every: dict[Part, list[Work]] = {part: [] for part in COLUMNS}
    met = dict.fromkeys(COLUMNS, 0)
    print("| task | training target | validation target |\n|---|---:|---:|")
    for task in pool_tasks(options.half, settings["seeds"], settings["trials"], settings["scale"], None, settings["examples"]):
        rate = rates(results, task.name)
        of = {c.label: curves(task, c, rate, options.rounds) for c in task.contenders if c.label in ("auto", REFERENCE)}
        cells = []
        for part in COLUMNS:
            ratio, reached = over(of["auto"], of[REFERENCE], part, aimed[part][task.name])
            every[part].append(ratio)
            met[part] += reached
            cells.append(f"{short(ratio[0])} / {short(ratio[1])}, {reached} of {len(task.seeds)}")
        print(f"| {task.name} | {' | '.join(cells)} |", flush=True)
    means = [
        " / ".join(short(statistics.geometric_mean(column)) for column in zip(*every[part], strict=True)) for part in COLUMNS
    ]
    print(f"| geometric mean | {' | '.join(f'{mean}, {met[part]}' for mean, part in zip(means, COLUMNS, strict=True))} |")


if __name__ == "__main__":
    main()
