"""Many steps of every recipe on a tiny model: what must not grow, does it?

python benchmarks/endurance.py [--steps 20000] [recipe ...]

Between the first and the last tenth of the steps, always at the same place of every schedule, these are compared: hooks on the
model, bytes of state, tensors and Python objects that are alive, and (where there are thousands of steps) the processor time of
a step. Ends with an error where one has grown.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from harness import table
from torch import Tensor, nn

import precond
from precond import BNP, L2, RMS, SAM, GradientNorm, Momentum, PreconditionedGD, Whitening, is_matrix

PERIOD = 20
"""Steps after which all schedules below are at the same place again."""

RUNS: dict[str, Callable[[nn.Module], PreconditionedGD]] = {
    "sgd": lambda m: precond.sgd(m, lr=0.01, momentum=0.9),
    "adagrad": lambda m: precond.adagrad(m),
    "rmsprop": lambda m: precond.rmsprop(m, lr=1e-3, momentum=0.9, centered=True),
    "adam": lambda m: precond.adam(m, amsgrad=True),
    "adamw": lambda m: precond.adamw(m),
    "bnp": lambda m: precond.bnp(m, lr=1e-3, momentum=0.9),
    "whitening": lambda m: precond.whitening(m, inputs=Whitening(every=PERIOD)),
    "shampoo": lambda m: precond.shampoo(m),
    "soap": lambda m: precond.soap(m, lr=1e-3),
    "muon": lambda m: precond.muon(m, where=is_matrix),
    "auto": lambda m: precond.auto(m, lr=1e-3, choice=precond.Auto(whitening=Whitening(every=PERIOD), polar=precond.Polar(10))),
    "adam in BNP's coordinates": lambda m: precond.adam(m, inputs=BNP()),
    "adamw, SAM in z": lambda m: precond.adamw(m, regularizers=[SAM(0.01)]),
    "adamw, skips": lambda m: precond.adamw(m, nonfinite="skip", max_norm=1.0),
    "PreconditionedGD, gradient norm": lambda m: PreconditionedGD(
        m, lr=1e-3, preconditioner=RMS(), momentum=Momentum(0.9), regularizers=[GradientNorm(1e-3), L2(1e-3)]
    ),
}


class Census(NamedTuple):
    """What is there."""

    hooks: int
    state: int
    tensors: int
    objects: int


def census(model: nn.Module, optimizer: torch.optim.Optimizer) -> Census:
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # looking at objects wakes deprecated attributes
        alive = gc.get_objects()
        tensors = sum(issubclass(type(x), Tensor) for x in alive)
    hooks = sum(len(hooks) for m in model.modules() for name, hooks in vars(m).items() if name.endswith("_hooks"))
    held = [t for entry in optimizer.state.values() for t in entry.values() if isinstance(t, Tensor)]
    return Census(hooks, sum(t.numel() * t.element_size() for t in held), tensors, len(alive))


def run(name: str, steps: int) -> tuple[list[str], list[str]]:
    """A row of the table, and what has grown."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3))
    optimizer = RUNS[name](model)
    batches = [(torch.randn(9, 5), torch.randint(3, (9,))) for _ in range(10)]
    seen: list[Census] = []
    spent: list[float] = []
    tenth = max(steps // 10 // PERIOD, 1) * PERIOD
    last = steps // PERIOD * PERIOD

    def closure(x: Tensor, y: Tensor) -> Any:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    for t in range(1, last + 1):
        x, y = batches[t % len(batches)]
        began = time.process_time()
        loss = optimizer.step(lambda: closure(x, y))  # noqa: B023
        spent.append(time.process_time() - began)
        if t in (2 * tenth, last):
            seen.append(census(model, optimizer))
    early, late = statistics.median(spent[tenth : 2 * tenth]), statistics.median(spent[-tenth:])
    first, end = seen[0], seen[-1]
    # A handful of objects come and go by themselves.
    grown = [k for k, a, b in zip(Census._fields, first, end, strict=True) if b > a + (50 if k == "objects" else 0)]
    if steps >= 5000 and late > 1.5 * early:
        grown.append("time")
    held = [t for entry in optimizer.state.values() for t in entry.values()]
    if not all(bool(t.isfinite().all()) for t in [*model.parameters(), *held]) or not bool(loss.isfinite()):
        grown.append("inf or NaN")
    row = [name, str(end.hooks), f"{end.state}", f"{end.tensors - first.tensors:+d}", f"{end.objects - first.objects:+d}"]
    return [*row, f"{1e6 * early:.0f}", f"{1e6 * late:.0f}", f"{loss.item():.3f}"], grown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=list(RUNS), metavar="recipe")
    parser.add_argument("--steps", type=int, default=20_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [["recipe", "hooks", "state, bytes", "tensors", "objects", "first tenth, µs", "last tenth, µs", "last loss"]]
    failed = []
    for name in options.recipes:
        row, grown = run(name, options.steps)
        rows.append(row)
        if grown:
            failed.append(f"{name}: {', '.join(grown)}")
    print(table(rows))
    if failed:
        sys.exit("grown: " + "; ".join(failed))


if __name__ == "__main__":
    main()
