"""What the second derivatives by all pre-activations cost, in gradients of the loss over the same samples, against width and depth.

python benchmarks/neurons.py
"""

from __future__ import annotations

import itertools

import torch
from harness import table, take_turns
from torch import nn

from precond.curvature import Objective, unit_curvatures
from precond.curvature.neurons.curvatures import chain_curvatures
from precond.curvature.neurons.layer import Layer
from precond.curvature.neurons.passes import opened

SAMPLES = 2000
WIDTHS = {
    "784-300-100-10": (784, 300, 100, 10),
    "784-100-100-10": (784, 100, 100, 10),
    "784-600-200-10": (784, 600, 200, 10),
    "784-100×3-10": (784, 100, 100, 100, 10),
    "784-100×4-10": (784, 100, 100, 100, 100, 10),
    "784-100×6-10": (784, *[100] * 6, 10),
}


def problem(widths: tuple[int, ...], activation: type[nn.Module], samples: int = SAMPLES) -> Objective:
    torch.manual_seed(0)
    layers = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), activation())]
    return Objective(
        nn.Sequential(*layers[:-1]),
        nn.CrossEntropyLoss(),
        (torch.rand(samples, widths[0]), torch.randint(0, widths[-1], (samples,))),
    )


def gradient(objective: Objective) -> None:
    (x, y) = objective.batches[0]
    torch.autograd.grad(objective.loss_fn(objective.model(x), y), objective.params)


def one_by_one(objective: Objective) -> None:
    """A double backprop per neuron on a graph that is kept, as any model allows."""
    for name, module in objective.model.named_modules():
        if isinstance(module, nn.Linear):
            with opened(objective, 0, Layer(objective.model, name, "benchmark")) as slopes:
                slopes.blocks(range(module.out_features))


def main() -> None:
    torch.set_num_threads(2)
    rows = [["network", "activation", "units", "gradient ms", "all L'' ms", "gradients"]]
    for label, widths in WIDTHS.items():
        for activation in (nn.Tanh, nn.ReLU):
            objective = problem(widths, activation)
            names = [name for name, m in objective.model.named_modules() if isinstance(m, nn.Linear)]
            assert set(chain_curvatures(objective, 0, names)) == set(names)
            rounds = 15 if len(widths) == 4 else 5
            times = take_turns(
                {"gradient": lambda o=objective: gradient(o), "all": lambda o=objective: unit_curvatures(o)},
                rounds=rounds,
                warm=2,
            )
            ratio = times["all"] / times["gradient"]
            units = str(sum(widths[1:]) - widths[-1] if False else sum(widths[1:]))
            rows.append(
                [label, activation.__name__, units, *(f"{1e3 * times[k]:.1f}" for k in ("gradient", "all")), f"{ratio:.2f}"]
            )
    print(table(rows))
    objective = problem(WIDTHS["784-300-100-10"], nn.Tanh)
    times = take_turns({"gradient": lambda: gradient(objective), "one": lambda: one_by_one(objective)}, rounds=3, warm=1)
    print(f"\none double backprop per unit, 784-300-100-10, tanh: {times['one'] / times['gradient']:.0f} gradients")


if __name__ == "__main__":
    main()
