"""``auto`` with and without the longer steps of layers of few outputs, on tasks of the pool that are not locked.

    python benchmarks/few_outputs.py [--tasks "PINN, Poisson;GRU, Lorenz series"] [--seeds 0,1] [--out few-outputs.json]

Trainings of 0.3 of the pool's steps. AdamW's rates are searched over a factor of 8, the others' are in the head of the table. A cell is the
steps to AdamW's lowest training loss / validation loss in units of AdamW's own, means over seeds, a miss counted with 1.2 of all steps.
Interrupted, it goes on from its file.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import precond
from precond.lab.workloads import peers, write_atomically
from precond.lab.workloads.entrant import Peer
from precond.lab.workloads.pool import POOL, members
from precond.lab.workloads.training import Plan, train

TASKS = (
    "PINN, Poisson", "PINN, Helmholtz", "PINN, Allen-Cahn", "PINN, Burgers", "GRU, Lorenz series", "LSTM, code", "diabetes, raw",
    "Friedman, raw scales", "conv net, digits", "GPT, code", "variational autoencoder, digits",
)  # fmt: skip


@dataclass(frozen=True)
class AsLong(precond.Polar):
    """Polar whose steps are as long whatever the number of outputs."""

    @staticmethod
    def spread(N: float, shape: Sequence[int]) -> float:
        return 1.0


ENTRANTS: dict[str, tuple[Callable[[nn.Module, float], Any], tuple[float, ...]]] = {
    "AdamW": (peers.adamw, (0.002, 0.004, 0.008, 0.016, 0.032)),
    "Muon": (peers.muon, (0.016, 0.032, 0.064, 0.128)),
    "as long": (lambda m, lr: precond.auto(m, lr, choice=precond.Auto(polar=AsLong(gain=2.0))), (0.01, 0.02, 0.04)),
    "auto": (precond.auto, (0.01, 0.02, 0.04)),
}


def curve(task: str, entrant: str, lr: float, seed: int) -> dict[str, list[float]]:
    """Steps, training and validation losses."""
    (member,) = (m for m in POOL if m.name == task)
    steps = round(0.3 * member.steps)
    made, plan = Peer(entrant, ENTRANTS[entrant][0], "peer"), Plan(lr, steps, seed, "cosine", steps // 20, 40, test=False)
    try:
        seen = train(member.workload(), made, plan)[0].curve
    except FloatingPointError:
        return {"step": [steps], "train": [math.inf], "validation": [math.inf]}
    return {"step": list(seen.step), "train": list(seen.train_loss), "validation": list(seen.validation_loss)}


def steps_to(seen: dict[str, list[float]], target: float, part: str) -> float:
    """To the first evaluation that meets it."""
    reached = (step for step, loss in zip(seen["step"], seen[part], strict=True) if loss <= target)
    return next(reached, 1.2 * seen["step"][-1])


def row(task: str, found: dict[str, dict[str, list[float]]], seeds: list[int]) -> str:
    """A line of the table."""
    cells: dict[str, dict[float, list[float]]] = {name: {} for name in ENTRANTS}
    for part in ("train", "validation"):
        curves = {
            (name, lr): [found[f"{task}|{name}|{lr}|{s}"] for s in seeds]
            for name, (_, rates) in ENTRANTS.items()
            for lr in rates
        }
        lowest = {lr: statistics.median_high(min(c[part]) for c in curves["AdamW", lr]) for lr in ENTRANTS["AdamW"][1]}
        best = min(lowest, key=lowest.__getitem__)
        own = statistics.mean(steps_to(c, lowest[best], part) for c in curves["AdamW", best])
        for (name, lr), of in curves.items():
            cells[name].setdefault(lr, []).append(statistics.mean(steps_to(c, lowest[best], part) for c in of) / own)
    muon = [min(by_part) for by_part in zip(*cells["Muon"].values(), strict=True)]
    texts = [muon, *cells["as long"].values(), *cells["auto"].values()]
    return f"| {task} | " + " | ".join(" / ".join(f"{x:.2f}" for x in both) for both in texts) + " |"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=";".join(TASKS))
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--out", default="few-outputs.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    allowed = {m.name for half in ("development", "opened") for m in members(half)}
    tasks, seeds, out = options.tasks.split(";"), [int(s) for s in options.seeds.split(",")], Path(options.out)
    if strange := [task for task in tasks if task not in allowed]:
        parser.error(f"--tasks: {strange[0]!r} is no task of the development half or the opened one")
    found = json.loads(out.read_text()) if out.exists() else {}
    heads = [f"{name}, {lr}" for name in ("as long", "auto") for lr in ENTRANTS[name][1]]
    print("| task | Muon, best rate |", " | ".join(heads), "|\n|---|" + "---:|" * (1 + len(heads)))
    for task in tasks:
        for name, (_, rates) in ENTRANTS.items():
            for lr in rates:
                for seed in seeds:
                    if (key := f"{task}|{name}|{lr}|{seed}") not in found:
                        found[key] = curve(task, name, lr, seed)
                        write_atomically(out, json.dumps(found))
        print(row(task, found, seeds), flush=True)


if __name__ == "__main__":
    main()
