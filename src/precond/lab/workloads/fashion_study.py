"""Fashion-MNIST with large and tiny batches: preconditioned inputs against BN layers, SGD and Adam."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from precond.lab.workloads.catalog import load_data
from precond.lab.workloads.models import Architecture, Normalization
from precond.lab.workloads.problem import BuiltIn
from precond.lab.workloads.search import LogUniform, Search
from precond.lab.workloads.study import Contender, Task
from precond.lab.workloads.syntax import parse_recipe
from precond.lab.workloads.training import Plan

_GRADIENT = LogUniform(1e-3, 3.0)
_SMALL = LogUniform(1e-5, 0.03)

# Label, recipe, normalization layers, and the range of its learning rate: 3.5 decades for each.
ENTRANTS: tuple[tuple[str, str, Normalization, LogUniform], ...] = (
    ("SGD", "sgd", "none", _GRADIENT),
    ("SGD, BN layers", "sgd", "batch", _GRADIENT),
    ("BNP", "bnp", "none", LogUniform(2e-4, 0.6)),
    ("Adam", "adam", "none", LogUniform(3e-5, 0.1)),
    ("BNP∘Adam", "adam(inputs=BNP())", "none", _SMALL),
    ("Whitening∘Adam", "adam(inputs=Whitening())", "none", _SMALL),
)


@dataclass(frozen=True)
class _Net:
    architecture: Architecture
    evaluated: int
    evaluations: int


_NETS = {
    "MLP": _Net(Architecture("mlp", (300, 100)), 2500, 12),
    "conv net": _Net(Architecture("convnet", (16, 32, 32)), 1500, 8),
}

# Batch size and net ↦ steps.
_STEPS = {
    128: {"MLP": 800, "conv net": 200},
    60: {"MLP": 1000, "conv net": 300},
    6: {"MLP": 1500, "conv net": 800},
    2: {"MLP": 1500, "conv net": 800},
    1: {"MLP": 1500, "conv net": 800},
}


def fashion_tasks(
    seeds: Iterable[int], trials: int, scale: float = 1.0, folder: Path | None = None, examples: int | None = None
) -> tuple[Task, ...]:
    """One task for each of two nets and five batch sizes.

    Warm-up over a twentieth of the steps, linear decay to 0. The target is the best validation loss of Adam.

    Args:
        seeds: of the trainings that are reported.
        trials: of each entrant's search.
        scale: times the steps of the table.
        folder: of the IDX files; None: where Debian puts them.
        examples: train on so many; None: on all 50,000.

    Raises:
        DataError: where files are absent or damaged.
    """
    data = load_data("fashion-mnist", folder=folder, examples=examples)

    def task(name: str, batch_size: int, steps: int) -> Task:
        net = _NETS[name]

        def make(normalization: Normalization) -> Callable[[], BuiltIn]:
            architecture = replace(net.architecture, normalization=normalization)
            return partial(BuiltIn, data, architecture, batch_size, evaluated=net.evaluated)

        contenders = tuple(
            Contender(parse_recipe(recipe, label), make(layers), space) for label, recipe, layers, space in ENTRANTS
        )
        facts = {**make("none")().facts, "batch size": str(batch_size), "steps": f"{steps:,}"}
        facts["evaluated on"] = f"{net.evaluated:,} training and as many validation examples; all test examples"
        plan = Plan(None, steps, 0, "linear", steps // 20, net.evaluations)
        return Task(
            f"{name}, batch {batch_size}", contenders, plan, tuple(seeds), Search(trials), metric="accuracy", facts=facts,
            reference="Adam", allowance=0.0,
        )  # fmt: skip

    return tuple(
        task(name, batch_size, max(2, round(scale * steps)))
        for batch_size, table in _STEPS.items()
        for name, steps in table.items()
    )
