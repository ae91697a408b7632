"""Whole training steps with input-side preconditioners, against plain SGD, the same net with BN layers, and AdamW.

python benchmarks/training.py [--threads 2] [--rounds 200] [--clock cpu]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from itertools import pairwise

import torch
from harness import table, take_turns
from torch import Tensor, nn

import precond

BATCH = 128


def mlp(batch_norm: bool = False) -> nn.Module:
    widths = [784, 300, 100, 10]
    layers: list[nn.Module] = []
    for k, (n, m) in enumerate(pairwise(widths)):
        layers += [nn.ReLU()] * (k > 0) + [nn.BatchNorm1d(n)] * batch_norm + [nn.Linear(n, m)]
    return nn.Sequential(nn.Flatten(), *layers)


def convnet(batch_norm: bool = False) -> nn.Module:
    layers: list[nn.Module] = [nn.BatchNorm2d(1)] * batch_norm + [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.BatchNorm2d(16)] * batch_norm + [nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, *[nn.BatchNorm1d(1568)] * batch_norm, nn.Linear(1568, 10))


class Transformer(nn.Module):
    """Two layers of width 128 on 64 characters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 128)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(128, 4, 512, 0.0, batch_first=True) for _ in range(2))
        self.head = nn.Linear(128, 96)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for layer in self.layers:
            h = layer(h)
        return self.head(h).transpose(1, 2)


def step_of(model: nn.Module, make: Callable[[nn.Module], torch.optim.Optimizer], x: Tensor, y: Tensor) -> Callable[[], None]:
    optimizer = make(model)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def cholesky(model: nn.Module) -> torch.optim.Optimizer:
    return precond.whitening(model, lr=1e-4, inputs=precond.Whitening(root="cholesky", rank=None))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=200, help="a multiple of the refresh period")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: of this process; for a busy machine")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    torch.manual_seed(0)
    images, labels = torch.rand(BATCH, 1, 28, 28), torch.randint(0, 10, (BATCH,))
    characters = torch.randint(0, 96, (16, 65))
    rows = [["model", "step", "ms", "against", "ratio of means"]]
    for name, build in (("MLP 784-300-100-10", mlp), ("conv net", convnet)):
        steps = {
            "SGD": step_of(build(), sgd, images, labels),
            "SGD with BN layers": step_of(build(True), sgd, images, labels),
            "BNP": step_of(build(), lambda m: precond.bnp(m, lr=1e-3), images, labels),
        }
        times = take_turns(steps, rounds=options.rounds, warm=25, mean=True, clock=clock)
        for other in ("SGD", "SGD with BN layers"):
            rows.append([name, "BNP", f"{1e3 * times['BNP']:.2f}", other, f"{times['BNP'] / times[other]:.2f}"])
    for name, build, x, y in (
        ("MLP 784-300-100-10", mlp, images, labels),
        ("conv net", convnet, images, labels),
        ("transformer 2×128", Transformer, characters[:, :-1], characters[:, 1:]),
    ):
        steps = {
            "AdamW": step_of(build(), adamw, x, y),
            "BNP with AdamW": step_of(build(), lambda m: precond.adamw(m, lr=1e-4, inputs=precond.BNP()), x, y),
            "whitening": step_of(build(), lambda m: precond.whitening(m, lr=1e-4), x, y),
            "whitening, Cholesky": step_of(build(), cholesky, x, y),
            "auto": step_of(build(), lambda m: precond.auto(m, lr=1e-4), x, y),
        }
        times = take_turns(steps, rounds=options.rounds, warm=130, mean=True, clock=clock)  # whole refresh periods
        for ours in ("BNP with AdamW", "whitening", "whitening, Cholesky", "auto"):
            rows.append([name, ours, f"{1e3 * times[ours]:.2f}", "AdamW (fused)", f"{times[ours] / times['AdamW']:.2f}"])
    print(table(rows))


if __name__ == "__main__":
    main()
