"""What a monitor costs: training with one at its default, against training without, in processor time of one thread.

The first measurement, which comes in advance, is left out; it takes ten products in place of three.

python benchmarks/monitor.py [mlp] [conv]
"""

from __future__ import annotations

import sys
import time

import torch
from harness import convnet, table
from torch import nn

import precond
from precond.analysis.curvature import Objective
from precond.analysis.diagnostics import Monitor


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))


OPTIMIZERS = {
    "torch AdamW": lambda net: torch.optim.AdamW(net.parameters(), fused=True),
    "precond adamw": precond.adamw,
    "precond BNP∘Adam": lambda net: precond.adam(net, inputs=precond.BNP()),
}


class Training:
    """Steps of one model on one batch, with a monitor on a batch of the same size or without."""

    def __init__(self, build, optimizer, batch: int, watched: bool):
        self.net = build()
        self.optimizer = optimizer(self.net)
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(batch, 1, 28, 28, generator=generator)
        self.y = torch.randint(0, 10, (batch,), generator=generator)
        self.monitor = None
        if watched:
            objective = Objective(self.net, nn.functional.cross_entropy, [(self.x, self.y)])
            self.monitor = Monitor(objective).attach(self.optimizer)

    def run(self, steps: int) -> float:
        if self.monitor is not None:
            self.monitor._began = None  # else the other training, which ran since, would count as this one's time
        start = time.process_time()
        for _ in range(steps):
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.net(self.x), self.y).backward()
            self.optimizer.step()
        return time.process_time() - start


MODELS = {"mlp": (mlp, 128, 400), "conv": (convnet, 32, 300)}


def main(names: list[str], rounds: int = 4) -> None:
    torch.set_num_threads(1)
    rows = [["model", "batch", "optimizer", "step ms", "measurement ms", "in steps", "one in", "training with / without"]]
    for label in names or MODELS:
        build, batch, steps = MODELS[label]
        for name, optimizer in OPTIMIZERS.items():
            without, watched = Training(build, optimizer, batch, False), Training(build, optimizer, batch, True)
            for training in (without, watched):
                training.run(20)
            watched.monitor.load_state_dict({**watched.monitor.state_dict(), "train_seconds": 0.0, "own_seconds": 0.0})
            counts: list[int] = []
            watched.monitor.sinks.append(lambda metrics, step, counts=counts: counts.append(step))
            times = [(without.run(steps), watched.run(steps)) for _ in range(rounds)]
            per_step = sum(a for a, _ in times) / rounds / steps
            start = time.process_time()
            for _ in range(5):
                watched.monitor.measure()
            cost = (time.process_time() - start) / 5
            rows.append(
                [label, str(batch), name, f"{1e3 * per_step:.2f}", f"{1e3 * cost:.1f}", f"{cost / per_step:.1f}",
                 f"{rounds * steps / max(len(counts), 1):.0f}", f"{sum(b for _, b in times) / sum(a for a, _ in times):.3f}"]
            )  # fmt: skip
            print(*rows[-1], sep="\t", flush=True)
    print(table(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
