"""Does BNP still gain behind normalization layers? Training losses with and without, at the best learning rate of each.

``python benchmarks/normalization.py --out experiments/normalization/normalization.json`` trains 64–64–64–10 with GELU on
standardized digits, the normalization behind each GELU, and prints a table; a second call goes on where the first was
interrupted. The data are standardized, so that BNP in the first layer is near the identity, and what it gains it gains behind
the normalizations. Learning rates are chosen by seed 100, whose losses are not reported; the reported ones are of seeds 0 to 4.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import nn

import precond
from precond.lab.workloads import write_atomically

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda n: nn.Identity(),
    "LayerNorm": nn.LayerNorm,
    "RMSNorm": nn.RMSNorm,
    "GroupNorm": lambda n: nn.GroupNorm(8, n),
    "BatchNorm": nn.BatchNorm1d,
}
OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], float]] = {
    "GD": (partial(precond.sgd, momentum=0.9), 0.03),
    "BNP": (partial(precond.bnp, momentum=0.9), 0.03),
    "Adam": (precond.adam, 3e-3),
    "BNP∘Adam": (partial(precond.adam, inputs=precond.BNP()), 3e-3),
}
FACTORS = [10 ** (k / 3) for k in range(-2, 3)]
EPOCHS, BATCH, SEARCH, SEEDS = 5, 64, 100, range(5)


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Standardized pixels that are not constant, and classes."""
    pixels, y = load_digits(return_X_y=True)
    x = torch.as_tensor(pixels, dtype=torch.float32)
    x = x[:, x.std(0) > 0]
    return (x - x.mean(0)) / x.std(0, correction=0), torch.as_tensor(y)


def loss_of(norm: str, optimizer: str, lr: float, seed: int) -> float:
    """The training loss of the last weights, in train mode for batch normalization as for the others; ∞ where it diverged."""
    x, y = data()
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for n, m in ((x.shape[1], 64), (64, 64)):
        layers += [nn.Linear(n, m), nn.GELU(), NORMS[norm](m)]
    model = nn.Sequential(*layers, nn.Linear(64, 10))
    make, _ = OPTIMIZERS[optimizer]
    opt = make(model, lr)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(x), generator=draw).split(BATCH):
            opt.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            opt.step()
    with torch.no_grad():
        found = float(nn.functional.cross_entropy(model(x), y))
    return found if math.isfinite(found) else math.inf


def cell(norm: str, optimizer: str) -> dict[str, object]:
    """The best learning rate, whether it is one within the range that was tried, and the losses of the seeds."""
    rates = [OPTIMIZERS[optimizer][1] * f for f in FACTORS]
    search = [loss_of(norm, optimizer, lr, SEARCH) for lr in rates]
    best = min(range(len(rates)), key=search.__getitem__)
    losses = [loss_of(norm, optimizer, rates[best], seed) for seed in SEEDS]
    return {"lr": rates[best], "inside": 0 < best < len(rates) - 1, "losses": losses}


def table(found: dict[str, dict]) -> Table:
    """Geometric means of losses, and of the ratios with BNP to without, seed by seed."""
    shown = Table("normalization", *OPTIMIZERS, "BNP/GD", "BNP∘Adam/Adam")
    for norm in NORMS:
        row = [found.get(f"{norm}, {name}") for name in OPTIMIZERS]
        if None in row:
            continue
        losses = [r["losses"] for r in row if r is not None]
        cells = [
            f"{statistics.geometric_mean(some):.2e}{'' if r['inside'] else ' (end)'}"
            for some, r in zip(losses, row, strict=True)
            if r
        ]
        for plain, bnp in ((0, 1), (2, 3)):
            ratios = [b / a for a, b in zip(losses[plain], losses[bnp], strict=True)]
            cells.append(f"{statistics.geometric_mean(ratios):.2g} ({min(ratios):.2g} to {max(ratios):.2g})")
        shown.add_row(norm, *cells)
    return shown


def main() -> None:
    """Train what is not known yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("normalization.json"))
    out = parser.parse_args().out
    torch.set_num_threads(1)
    console = Console()
    found = json.loads(out.read_text()) if out.exists() else {}
    for norm in NORMS:
        for optimizer in OPTIMIZERS:
            if (key := f"{norm}, {optimizer}") not in found:
                with console.status(key):
                    found[key] = cell(norm, optimizer)
                write_atomically(out, json.dumps(found, indent=1))
    console.print(table(found))


if __name__ == "__main__":
    main()
