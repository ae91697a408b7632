"""Kernels of one layer on a processor against the stacks that would do without them: CPU time of a step, and the ratio.

python benchmarks/kernels.py [--rounds 40] [--only whitening]

A kernel that does not pay is deleted. Gradients and inputs are random; both take turns in one process, on one thread.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch
from torch import nn

import precond
from precond.optim.engine import fused, plan

Shapes = list[tuple[int, int]]
LAYERS: dict[str, Shapes] = {
    **{f"{k} of {n}×{n}": [(n, n)] * k for n in (8, 32, 64, 128) for k in (4, 8, 16)},
    "64-64-64-10": [(64, 64), (64, 64), (10, 64)],
    "MLP 784-300-100-10": [(300, 784), (100, 300), (10, 100)],
    "transformer 2×128": [(384, 128), (128, 128), (512, 128), (128, 512)] * 2 + [(96, 128)],
    "transformer 3×384": [(1152, 384), (384, 384), (1536, 384), (384, 1536)] * 3,
}
RECIPES: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "bnp": lambda m: precond.bnp(m, lr=1e-3, momentum=0.9),
    "adamw behind BNP": lambda m: precond.adamw(m, lr=1e-4, inputs=precond.BNP()),
    "whitening": lambda m: precond.whitening(m, lr=1e-4),
    "auto": lambda m: precond.auto(m, lr=1e-4),
}


def steps(shapes: Shapes, make: Callable[[nn.Module], torch.optim.Optimizer]) -> Callable[[], float]:
    """Takes a step, and says how long it took."""
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(n, m) for m, n in shapes)
    optimizer, generator, gradients = make(model), torch.Generator().manual_seed(1), list(model.parameters())
    inputs = {n: torch.randn(128, n, generator=generator) for _, n in shapes}

    def step() -> float:
        for p in gradients:
            p.grad = torch.randn(p.shape, generator=generator) * 1e-2
        for layer in model:
            layer(inputs[layer.in_features])
        start = time.process_time()
        optimizer.step()
        return time.process_time() - start

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--only", default="", help="recipes and layers whose names hold this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| recipe | layers | ms, kernel | ms, stacks | ratio |\n|---|---|---|---|---|")
    for name, make in RECIPES.items():
        for label, shapes in LAYERS.items():
            if options.only not in f"{name} {label}":
                continue
            with (
                mock.patch.object(plan, "has_kernel", lambda *_: False),
                mock.patch.object(fused, "_of_layer", lambda *_: None),
            ):
                stacks = steps(shapes, make)
                for _ in range(10):
                    stacks()
            with mock.patch.object(plan, "stacked_from", lambda *_: math.inf):
                kernel = steps(shapes, make)
                for _ in range(10):
                    kernel()
            pairs = [(kernel(), stacks()) for _ in range(options.rounds)]
            a, b = (1e3 * statistics.fmean(t) for t in zip(*pairs, strict=True))
            print(f"| {name} | {label} | {a:.2f} | {b:.2f} | {b / a:.2f} |", flush=True)


if __name__ == "__main__":
    main()
