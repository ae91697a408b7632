"""What a probing regularizer costs: a step with its gradients, against as many gradients and the plain step.

python benchmarks/probes.py
"""

from __future__ import annotations

import torch
from harness import convnet, table, take_turns
from torch import nn

import precond


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))


def closure(net: nn.Module, optimizer: torch.optim.Optimizer, batch: int):
    x, y = torch.randn(batch, 1, 28, 28), torch.randint(0, 10, (batch,))

    def run():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        return loss

    return run


CASES = {
    "SAM in p": (precond.SAM(0.05, space="p"), 2),
    "SAM in z": (precond.SAM(0.05), 2),
    "GradientNorm in p, forward": (precond.GradientNorm(1e-3, space="p"), 2),
    "GradientNorm in z, forward": (precond.GradientNorm(1e-3), 2),
    "GradientNorm in z, central": (precond.GradientNorm(1e-3, method="central"), 3),
}


def main() -> None:
    torch.set_num_threads(2)
    rows = [["model", "batch", "regularizer", "gradients", "step ms", "gradients + adamw ms", "ratio"]]
    for label, build, batch in (("MLP 784-512-512-10", mlp, 128), ("MLP 784-512-512-10", mlp, 512), ("conv net", convnet, 128)):
        for name, (regularizer, gradients) in CASES.items():
            net, plain = build(), build()
            optimizer = precond.adamw(net, regularizers=(regularizer,))
            base = torch.optim.AdamW(plain.parameters(), fused=True)
            run, gradient = closure(net, optimizer, batch), closure(plain, base, batch)

            def floor(gradient=gradient, base=base, gradients=gradients):
                for _ in range(gradients):
                    gradient()
                base.step()

            times = take_turns({"ours": lambda o=optimizer, r=run: o.step(r), "floor": floor}, rounds=80)
            row = [label, str(batch), name, str(optimizer.last.gradients)]
            rows.append([*row, *(f"{1e3 * times[k]:.2f}" for k in ("ours", "floor")), f"{times['ours'] / times['floor']:.3f}"])
    print(table(rows))


if __name__ == "__main__":
    main()
