"""Whether ``auto`` at its default learning rate, without any search, reaches what a searched AdamW reaches, on the pool's development half.

    python benchmarks/default_rate.py [--seeds 0,1,2] [--table]

Targets, steps of AdamW and scale are those of ``experiments/pool/results.json``; trainings are kept in ``experiments/pool/default.json``, and
those that are there are not made again. ``--table`` shows what is there.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import precond
from precond.lab.report.numbers import short
from precond.lab.report.pairs import Part, retargeted
from precond.lab.report.results import Results, load_results
from precond.lab.report.summary import table
from precond.lab.workloads import write_atomically
from precond.lab.workloads.pool.tasks import EVALUATIONS, members
from precond.lab.workloads.syntax import parse_recipe
from precond.lab.workloads.training import Plan, train

FOLDER = Path(__file__).parents[1] / "experiments" / "pool"
COLUMNS: dict[Part, str] = {"train": "train_loss", "validation": "validation_loss"}


def trained(results: Results, seeds: Sequence[int]) -> dict[str, Any]:
    """Curves by task and seed."""
    file = FOLDER / "default.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    lr = inspect.signature(precond.auto).parameters["lr"].default
    wanted = {task.name for task in results.tasks}
    for member in (m for m in members("development") if m.name in wanted):
        steps = max(2, round(results.settings["scale"] * member.steps))
        for seed in seeds:
            key = f"{member.name}, seed {seed}"
            if key not in found:
                plan = Plan(lr, steps, seed, "cosine", steps // 20, EVALUATIONS, test=False)
                curve = train(member.workload(), parse_recipe("auto", "auto"), plan)[0].curve
                found[key] = {name: getattr(curve, name) for name in ("step", *COLUMNS.values())}
                write_atomically(file, json.dumps(found))
    return found


def shown(results: Results, found: dict[str, Any]) -> str:
    """Steps to both targets over AdamW's, medians over seeds, and how many trainings reached them."""
    lines = ["| task | training: steps, reached | validation: steps, reached |", "|---|---:|---:|"]
    ratios: dict[Part, list[float]] = {part: [] for part in COLUMNS}
    aimed = {part: {task.name: task for task in retargeted(results, part).tasks} for part in COLUMNS}
    for name in aimed["train"]:
        cells = []
        for part, column in COLUMNS.items():
            task = aimed[part][name]
            unit = next(row for row in table(task) if row.label == task.reference).to_target["step"].median
            curves = [curve for key, curve in found.items() if key.startswith(f"{name}, seed")]
            met = [
                next((n for n, x in zip(c["step"], c[column], strict=True) if x <= task.target.value), math.inf) for c in curves
            ]
            middle = statistics.median_high(met)
            bound = "" if math.isfinite(middle) else "> "
            ratios[part].append((middle if not bound else curves[0]["step"][-1]) / unit)
            cells.append(f"{bound}{short(ratios[part][-1])}, {sum(map(math.isfinite, met))} of {len(met)}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    means = [short(statistics.geometric_mean(values)) for values in ratios.values()]
    return "\n".join([*lines, f"| geometric mean | {' | '.join(means)} |"])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = load_results(FOLDER / "results.json")
    print(shown(results, trained(results, () if options.table else [int(s) for s in options.seeds.split(",")])))


if __name__ == "__main__":
    main()
