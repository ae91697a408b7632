"""``auto`` as it is now on a table of the pool that was made before: the same tasks, rates and seeds, and AdamW beside it for the seconds.

    python benchmarks/again.py [--half sealed] [--rounds 3]

Nothing is searched, and the tasks were known by now: it shows what has become of a table, and is none. A cell is steps / seconds to the
training target, then to the validation target, of the file, over those of AdamW; medians over seeds, with a miss "> " and all of the training.
Seconds are the processor's, medians of some rounds through both.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch

from precond.lab.report.numbers import NONE
from precond.lab.report.pairs import Part, retargeted
from precond.lab.report.ratios import overall, ratios
from precond.lab.report.results import TaskResults, load_results
from precond.lab.report.summary import table
from precond.lab.workloads import Outcome
from precond.lab.workloads.pool.tasks import REFERENCE, pool_tasks
from precond.lab.workloads.study import Contender, Task
from precond.lab.workloads.training import train

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
PARTS: tuple[Part, ...] = get_args(Part)
OURS = "auto"


def trained(task: Task, contender: Contender, before: Outcome, rounds: int) -> Outcome:
    """The same training, with the median of its rounds for the seconds."""
    plan = replace(task.plan, lr=before.lr, seed=before.seed, test=False)
    first, *others = (train(contender.workload(), contender.entrant, plan)[0] for _ in range(rounds))
    seconds = [first.curve.cpu_seconds, *(other.curve.cpu_seconds for other in others)]
    first.curve.cpu_seconds[:] = [statistics.median(at) for at in zip(*seconds, strict=True)]
    return first


def again(task: Task, before: TaskResults, rounds: int) -> TaskResults:
    """``auto`` and AdamW on a task, at the rates that were searched."""
    known = {entry.label: entry for entry in before.entries}
    entries = [
        replace(known[c.label], runs=tuple(trained(task, c, run, rounds) for run in known[c.label].runs))
        for c in task.contenders
        if c.label in (OURS, REFERENCE)
    ]
    return replace(before, entries=tuple(entries))


def met(task: TaskResults) -> int:
    """How many of our trainings reached the target."""
    return next(row.to_target["step"].reached for row in table(task) if row.label == OURS)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--half", default="sealed")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = replace(load_results(EXPERIMENTS / f"pool-{options.half}" / "results.json"), clock="cpu_seconds")
    settings: Any = results.settings
    before = {task.name: task for task in results.tasks}
    targets = {part: {task.name: task.target for task in retargeted(results, part).tasks} for part in PARTS}
    found: dict[Part, list[TaskResults]] = {part: [] for part in PARTS}
    print("| task | training target | validation target |\n|---|---:|---:|")
    for task in pool_tasks(options.half, settings["seeds"], settings["trials"], settings["scale"], None, settings["examples"]):
        made, cells = again(task, before[task.name], options.rounds), []
        for part in PARTS:
            of_part = replace(made, target=targets[part][task.name])
            steps, seconds = (ratios(of_part, work).get(OURS, NONE) for work in ("step", results.clock))
            cells.append(f"{steps} / {seconds}, {met(of_part)} of {len(task.seeds)}")
            found[part].append(of_part)
        print(f"| {task.name} | {' | '.join(cells)} |", flush=True)
    cells = []
    for part in PARTS:
        mean = next(one for one in overall(replace(results, tasks=tuple(found[part]))) if one.label == OURS)
        cells.append(f"{mean.steps} / {mean.seconds}, {sum(map(met, found[part]))}")
    print(f"| geometric mean | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
