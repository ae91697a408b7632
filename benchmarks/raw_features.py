"""Every recipe at its default learning rate on tables nobody has scaled: training and validation loss, medians over seeds.

    python benchmarks/raw_features.py [--steps 400] [--seeds 0,1,2] [--only whitening,auto]

scikit-learn's wine, breast cancer and diabetes as they are, an MLP with two hidden layers of 64, batches of 32, a rate that falls to 0 along
half a cosine. A cell is loss after a quarter of the steps / after all, and the least validation loss of the two.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import precond
from precond.lab.report.numbers import short
from precond.lab.workloads.catalog import load_data
from precond.lab.workloads.pool.tabular import MLP

ENTRANTS: dict[str, Callable[[nn.Module], Any]] = {
    "torch AdamW": lambda m: torch.optim.AdamW(m.parameters()),
    "torch AdamW, standardized first": lambda m: torch.optim.AdamW(m.parameters()),
    "whitening": precond.whitening,
    "adamw, inputs=BNP()": lambda m: precond.adamw(m, inputs=precond.BNP()),
    "Whitening ∘ RMS": lambda m: precond.PreconditionedGD(
        m, 1e-3, preconditioner=precond.Whitening() @ precond.RMS(), momentum=precond.Momentum(0.9)
    ),
    "bnp": precond.bnp,
    "muon": precond.muon,
    "soap": precond.soap,
    "auto": precond.auto,
}


def trained(data: str, entrant: str, steps: int, seed: int) -> tuple[float, float, float]:
    """(training loss after a quarter, after all; the least validation loss)."""
    found = load_data(data, seed=seed)
    (x, y), (x_held, y_held) = ((part.inputs, part.targets) for part in (found.parts["train"], found.parts["validation"]))
    if entrant.endswith("standardized first"):
        mean, std = x.mean(0), x.std(0)
        x, x_held = (x - mean) / std, (x_held - mean) / std
    loss_fn = F.cross_entropy if found.task == "classification" else F.mse_loss
    torch.manual_seed(seed)
    model = MLP(x.shape[1], 64, 64, found.outputs)
    optimizer = ENTRANTS[entrant](model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    out: list[float] = []
    for step in range(1, steps + 1):
        batch = torch.randint(len(x), (32,))
        optimizer.zero_grad()
        loss_fn(model(x[batch]), y[batch]).backward()
        optimizer.step()
        schedule.step()
        if step in (steps // 4, steps):
            with torch.no_grad():
                out += [loss_fn(model(x), y).item(), loss_fn(model(x_held), y_held).item()]
    return out[0], out[2], min(out[1], out[3])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds, data = [int(s) for s in options.seeds.split(",")], ("wine", "breast-cancer", "diabetes")
    wanted = [name for name in ENTRANTS if not options.only or name in options.only.split(",")]
    print("| at its default rate |", " | ".join(data), "|\n|---|" + "---:|" * len(data))
    for name in wanted:
        cells = []
        for each in data:
            columns = zip(*(trained(each, name, options.steps, seed) for seed in seeds), strict=True)
            early, late, held = map(short, map(statistics.median, columns))
            cells.append(f"{early} / {late}, {held}")
        print(f"| {name} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
