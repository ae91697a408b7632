"""What the second derivatives by all pre-activations cost, in gradients of the loss over the same samples, against width and depth.

python benchmarks/neurons.py
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import torch
from harness import table, take_turns
from torch import nn

from precond.analysis.curvature import Objective, neuron_hessians, unit_curvatures
from precond.analysis.curvature.neurons.curvatures import chain_curvatures
from precond.analysis.curvature.neurons.layer import Layer
from precond.analysis.curvature.neurons.passes import opened

SAMPLES = 2000
WIDTHS = {
    "784-300-100-10": (784, 300, 100, 10),
    "784-100-100-10": (784, 100, 100, 10),
    "784-600-200-10": (784, 600, 200, 10),
    "784-100×3-10": (784, *[100] * 3, 10),
    "784-100×4-10": (784, *[100] * 4, 10),
    "784-100×6-10": (784, *[100] * 6, 10),
}


def mlp(widths: tuple[int, ...], activation: type[nn.Module]) -> Objective:
    torch.manual_seed(0)
    layers = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), activation())]
    data = (torch.rand(SAMPLES, widths[0]), torch.randint(0, widths[-1], (SAMPLES,)))
    return Objective(nn.Sequential(*layers[:-1]), nn.CrossEntropyLoss(), data)


def convnet(activation: type[nn.Module], samples: int) -> Objective:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2),
        activation(),
        nn.Conv2d(8, 16, 3, stride=2),
        activation(),
        nn.Flatten(),
        nn.Linear(576, 10),
    )
    return Objective(model, nn.CrossEntropyLoss(), (torch.rand(samples, 1, 28, 28), torch.randint(0, 10, (samples,))))


def gradient(objective: Objective) -> None:
    (x, y) = objective.batches[0]
    torch.autograd.grad(objective.loss_fn(objective.model(x), y), objective.params)


def one_by_one(objective: Objective) -> None:
    """A double backprop per neuron on a graph that is kept, as any model allows."""
    for name, module in objective.model.named_modules():
        if isinstance(module, nn.Linear):
            with opened(objective, 0, Layer(objective.model, name, "benchmark")) as slopes:
                slopes._blocks_by_products(range(module.out_features))


def main() -> None:
    torch.set_num_threads(1)
    rows = [["network", "activation", "what", "gradient ms", "it ms", "gradients"]]

    def add(
        label: str, activation: type[nn.Module], what: str, objective: Objective, f: Callable[[], object], rounds: int
    ) -> None:
        t = take_turns({"gradient": lambda: gradient(objective), "it": f}, rounds, warm=1, clock=time.process_time)
        times = [f"{1e3 * t[k]:.1f}" for k in ("gradient", "it")]
        rows.append([label, activation.__name__, what, *times, f"{t['it'] / t['gradient']:.1f}"])

    for label, widths in WIDTHS.items():
        for activation in (nn.Tanh, nn.ReLU):
            objective = mlp(widths, activation)
            names = [name for name, m in objective.model.named_modules() if isinstance(m, nn.Linear)]
            assert set(chain_curvatures(objective, 0, names)) == set(names)
            what = f"L'' of {sum(widths[1:])} units"
            add(label, activation, what, objective, lambda o=objective: unit_curvatures(o), 9 if len(widths) == 4 else 3)
    objective = mlp(WIDTHS["784-300-100-10"], nn.Tanh)
    add("784-300-100-10", nn.Tanh, "one double backprop per unit", objective, lambda: one_by_one(objective), 1)
    for activation, units in ((nn.ReLU, 16), (nn.Tanh, 1)):
        net = convnet(activation, 200)
        what = f"S of {units} channels at 36 positions"
        add("conv net", activation, what, net, lambda n=net, u=units: neuron_hessians(n, "2", range(u)), 3)
    print(table(rows))


if __name__ == "__main__":
    main()
