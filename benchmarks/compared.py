"""Variants of ``auto`` on tasks of the pool, beside AdamW and Muon: what the scripts that study one rule have in common."""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from precond.lab.workloads import peers, write_atomically
from precond.lab.workloads.entrant import Peer
from precond.lab.workloads.pool import POOL
from precond.lab.workloads.training import Plan, train

Variant = Callable[[nn.Module, float], Any]
"""From a model and a learning rate to an optimizer."""

REFERENCES: Mapping[str, tuple[Variant, tuple[float, ...]]] = {
    "AdamW": (peers.adamw, (0.002, 0.004, 0.008, 0.016, 0.032)),
    "Muon": (peers.muon, (0.016, 0.032, 0.064, 0.128)),
}


def curve(task: str, variant: Variant, lr: float, seed: int) -> dict[str, list[float]]:
    """Steps, training and validation losses of a training of 0.3 of the pool's steps."""
    (member,) = (m for m in POOL if m.name == task)
    steps = round(0.3 * member.steps)
    made, plan = Peer("variant", variant, "peer"), Plan(lr, steps, seed, "cosine", steps // 20, 40, test=False)
    try:
        seen = train(member.workload(), made, plan)[0].curve
    except FloatingPointError:
        return {"step": [steps], "train": [math.inf], "validation": [math.inf]}
    return {"step": list(seen.step), "train": list(seen.train_loss), "validation": list(seen.validation_loss)}


def steps_to(seen: dict[str, list[float]], target: float, part: str) -> float:
    """To the first evaluation that meets it."""
    reached = (step for step, loss in zip(seen["step"], seen[part], strict=True) if loss <= target)
    return next(reached, 1.2 * seen["step"][-1])


def row(task: str, of: Mapping[tuple[str, float], list[dict[str, list[float]]]]) -> str:
    """A line of the table, from curves by names and rates."""
    cells: dict[str, dict[float, list[float]]] = {name: {} for name, _ in of}
    for part in ("train", "validation"):
        lowest = {lr: statistics.median_high(min(c[part]) for c in of["AdamW", lr]) for lr in REFERENCES["AdamW"][1]}
        best = min(lowest, key=lowest.__getitem__)
        own = statistics.mean(steps_to(c, lowest[best], part) for c in of["AdamW", best])
        for (name, lr), curves in of.items():
            cells[name].setdefault(lr, []).append(statistics.mean(steps_to(c, lowest[best], part) for c in curves) / own)
    muon = [min(by_part) for by_part in zip(*cells["Muon"].values(), strict=True)]
    texts = [muon, *(cell for name in cells if name not in REFERENCES for cell in cells[name].values())]
    return f"| {task} | " + " | ".join(" / ".join(f"{x:.2f}" for x in both) for both in texts) + " |"


def main(
    about: str | None,
    tasks: Sequence[str],
    allowed: Sequence[str],
    variants: Mapping[str, Variant],
    rates: Sequence[float],
    out: str,
) -> None:
    """The command: all that is missing in its file is trained, and a line printed for each task."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=";".join(tasks))
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--out", default=out)
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen, seeds, file = options.tasks.split(";"), [int(s) for s in options.seeds.split(",")], Path(options.out)
    if strange := [task for task in chosen if task not in allowed]:
        parser.error(f"--tasks: {strange[0]!r} is none of {', '.join(allowed)}")
    found = json.loads(file.read_text()) if file.exists() else {}
    entrants = {**REFERENCES, **{name: (variant, tuple(rates)) for name, variant in variants.items()}}
    heads = [f"{name}, {lr}" for name in variants for lr in rates]
    print("| task | Muon, best rate |", " | ".join(heads), "|\n|---|" + "---:|" * (1 + len(heads)))
    for task in chosen:
        keys = {(name, lr): [f"{task}|{name}|{lr}|{s}" for s in seeds] for name, (_, of) in entrants.items() for lr in of}
        for (name, lr), of_seeds in keys.items():
            for seed, key in zip(seeds, of_seeds, strict=True):
                if key not in found:
                    found[key] = curve(task, entrants[name][0], lr, seed)
                    write_atomically(file, json.dumps(found))
        print(row(task, {k: [found[key] for key in of_seeds] for k, of_seeds in keys.items()}), flush=True)
