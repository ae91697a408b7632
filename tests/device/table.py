"""What a step of each recipe may cost on a device: the limit in force and the one to reach, for a GPT of 148 tensors.

The limit in force is what was measured when it was last set. Whoever makes a step cheaper lowers it to what ``python
benchmarks/launches.py`` prints; none may rise beyond the one to reach. What hooks noted is there before a step and no part of its temporaries.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import nn

import precond
from device.driving import Cost, Make, cost
from device.pretended import to_device
from precond import BNP, SAM, Whitening


@dataclass(frozen=True)
class Limits:
    """At most so much.

    Attributes:
        launches: of the typical step among steps 11 to 20, hooks included.
        worst: those of the worst step, by the typical one's.
        reads: times that a step, or a hook in its forward, waits for the device.
        temporaries: bytes a parameter of the typical step.
        worst_temporaries: those of the worst step, by the typical one's.
    """

    launches: float
    worst: float
    reads: int
    temporaries: float
    worst_temporaries: float = 1.0

    def passed(self, cost: Cost) -> list[str]:
        """Which of them the cost exceeds, and by how much."""
        names = [f.name for f in fields(self)]
        return [
            f"{name} {getattr(cost, name):.4g} > {getattr(self, name):g}"
            for name in names
            if getattr(cost, name) > getattr(self, name)
        ]


@dataclass(frozen=True)
class Row:
    make: Make
    now: Limits
    goal: Limits


def goal(launches: float, temporaries: float) -> Limits:
    return Limits(launches, worst=1.5, reads=0, temporaries=temporaries, worst_temporaries=1.3)


def tensor_lr(model: nn.Module) -> torch.optim.Optimizer:
    return precond.adamw(model, lr=to_device(torch.tensor(1e-3)))


ROWS: dict[str, Row] = {
    "sgd": Row(lambda m: precond.sgd(m, lr=0.1, momentum=0.9, weight_decay=1e-4), Limits(4, 1.0, 0, 0.1), goal(10, 1)),
    "adagrad": Row(precond.adagrad, Limits(6, 1.0, 0, 0.1), goal(10, 1)),
    "rmsprop": Row(precond.rmsprop, Limits(6, 1.0, 0, 0.1), goal(10, 1)),
    "adamw": Row(precond.adamw, Limits(6, 1.0, 0, 0.1), goal(10, 1)),
    "adamw, tensor lr": Row(tensor_lr, Limits(6, 1.0, 0, 0.1), goal(10, 1)),
    "adamw, SAM in z": Row(lambda m: precond.adamw(m, regularizers=[SAM(1e-3)]), Limits(70, 1.0, 0, 12.1), goal(80, 9)),
    "bnp": Row(lambda m: precond.bnp(m, lr=1e-3, momentum=0.9), Limits(334, 1.0, 0, 1.5), goal(350, 6)),
    "adam in BNP's coordinates": Row(lambda m: precond.adam(m, inputs=BNP()), Limits(379, 1.0, 0, 4.0), goal(400, 6)),
    "muon": Row(precond.muon, Limits(129, 1.0, 0, 5.2), goal(150, 6)),
    "soap": Row(precond.soap, Limits(195, 1.0, 0, 6.4), goal(250, 12)),
    "soap, rank 16": Row(lambda m: precond.soap(m, rank=16), Limits(264, 1.03, 0, 6.6), goal(400, 12)),
    "shampoo": Row(precond.shampoo, Limits(225, 1.03, 0, 6.7, 1.34), goal(250, 12)),
    "whitening": Row(precond.whitening, Limits(364, 1.39, 0, 4.8, 1.04), goal(400, 12)),
    "whitening, rank 8": Row(
        lambda m: precond.whitening(m, inputs=Whitening(rank=8)), Limits(372, 1.22, 0, 4.8, 1.04), goal(400, 12)
    ),
    "auto": Row(precond.auto, Limits(478, 1.37, 0, 8.8, 1.15), goal(500, 12)),
}


def cost_of(name: str) -> Cost:
    """Measured now."""
    return cost(ROWS[name].make)
