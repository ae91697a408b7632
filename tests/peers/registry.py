"""What torch.optim's own test registry demands of its optimizers, as tables: arguments that work, and what bad ones raise.

The registry itself (``torch.testing._internal.common_optimizers``) imports expecttest; ``test_registry.py`` compares these
tables with it where that is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

ADAM = [
    {},
    {"lr": 0.01},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "maximize": True},
    {"weight_decay": 0.1, "amsgrad": True},
]

INPUTS: dict[str, list[dict[str, Any]]] = {
    "SGD": [
        {},
        {"lr": 0.01},
        {"lr": torch.tensor(0.001)},
        {"weight_decay": 0.5},
        {"momentum": 0.9},
        {"weight_decay": 0.1, "maximize": True},
        {"momentum": 0.9, "dampening": 0.5},
        {"momentum": 0.9, "weight_decay": 0.1},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    ],
    "Adagrad": [
        {},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "maximize": True},
        {"lr": 0.1},
        {"initial_accumulator_value": 0.1, "weight_decay": 0.1},
        {"lr": 0.1, "lr_decay": 0.5, "weight_decay": 0.1},
        {"lr": torch.tensor(0.001)},
    ],
    "RMSprop": [
        {},
        {"lr": 0.001},
        {"weight_decay": 0.1},
        {"maximize": True},
        {"weight_decay": 0.1, "centered": True},
        {"maximize": True, "weight_decay": 0.1},
        {"weight_decay": 0.1, "centered": True, "momentum": 0.1},
        {"weight_decay": 0.1, "centered": True, "momentum": 0.1, "maximize": True},
    ],
    "Adam": ADAM,
    "AdamW": ADAM,
    "Muon": [
        {},
        {"lr": 0.01},
        {"lr": torch.tensor(0.001)},
        {"weight_decay": 0.2},
        {"momentum": 0.8},
        {"ns_steps": 6},
        {"ns_coefficients": (3.4, -4.7, 2.0)},
    ],
}
"""By torch's class: the arguments that must work, beside the parameters."""

FURTHER: dict[str, list[dict[str, Any]]] = {
    "SGD": [{"foreach": True}, {"fused": True}, {"foreach": False, "fused": False}],
    "Adagrad": [{"foreach": True}, {"fused": True}],
    "RMSprop": [{"foreach": True}],
    "Adam": [
        {"foreach": True},
        {"fused": True},
        {"lr": torch.tensor(0.001)},
        {"betas": (torch.tensor(0.9), torch.tensor(0.99))},
        {"betas": [0.8, 0.9]},
    ],
    "AdamW": [{"foreach": True}, {"fused": True}, {"lr": torch.tensor([0.001])}],
    "Muon": [{"nesterov": False}, {"adjust_lr_fn": "original"}, {"adjust_lr_fn": "match_rms_adamw"}],
}
"""What torch's tests add to these: the implementations, and tensors where torch takes them on the CPU."""


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.full(shape or (2, 3), 0.5))


def _twice() -> list[nn.Parameter]:
    p = parameter()
    return [p, p]


def _in_two_groups() -> list[dict[str, Any]]:
    p = parameter()
    return [{"params": p}, {"params": p}]


@dataclass(frozen=True)
class Bad:
    """Parameters and arguments, and what they raise.

    Attributes:
        error: torch's type.
        words: what our message says of it.
        theirs: torch's message; None where torch has no test of it.
    """

    error: type[BaseException]
    words: str
    theirs: str | None
    options: dict[str, Any] = field(default_factory=dict)
    params: Callable[[], Any] = lambda: [parameter()]


SHARED: dict[str, Bad] = {
    "one tensor": Bad(TypeError, r"pass \[tensor\]", "should be an iterable of Tensors or dicts", params=parameter),
    "a parameter twice": Bad(UserWarning, "it is taken once", "duplicate parameters", params=_twice),
    "in two groups": Bad(
        ValueError, "put it into one of them", "appear in more than one parameter group", params=_in_two_groups
    ),
    "two learning rates": Bad(
        ValueError, "lr must hold one number", "Tensor lr must be 1-element", {"lr": torch.tensor([0.001, 0.001])}
    ),
    "names for some": Bad(
        ValueError,
        "names some parameters",
        "Some param names are missing",
        params=lambda: [("weight", parameter()), parameter()],
    ),
    "names for some groups": Bad(
        ValueError,
        "names some parameters",
        "cannot add param group with names",
        params=lambda: [{"params": [parameter()], "lr": 0.01}, {"params": [("weight", parameter())]}],
    ),
    "nothing": Bad(ValueError, "params is empty", "empty parameter list", params=list),
    "no tensors": Bad(TypeError, "must hold tensors, got float", "can only optimize Tensors", params=lambda: [1.0]),
    "a set": Bad(TypeError, "pass a list", "use a list instead", params=lambda: [{"params": {parameter()}}]),
    "computed": Bad(ValueError, "pass what it was computed from", "non-leaf", params=lambda: [parameter() * 2]),
    "negative lr": Bad(ValueError, "lr must be a finite number >= 0", "earning rate", {"lr": -1.0}),
    "lr in words": Bad(TypeError, "lr must be a number, got '0.1'", "not supported between", {"lr": "0.1"}),
}
"""What every optimizer must refuse."""

BETAS = {
    "beta1": Bad(ValueError, r"betas\[0\] must lie in", "at index 0", {"lr": 0.01, "betas": (1.0, 0.0)}),
    "beta2": Bad(ValueError, r"betas\[1\] must lie in", "at index 1", {"betas": (0.9, 1.0)}),
    "negative decay": Bad(ValueError, "weight_decay must be", "Invalid weight_decay", {"lr": 0.01, "weight_decay": -1}),
    "negative eps": Bad(ValueError, "eps must be", "Invalid epsilon", {"eps": -1.0}),
    "foreach with a tensor lr": Bad(
        ValueError, "lr as a tensor", "lr as a Tensor", {"lr": torch.tensor(0.001), "foreach": True}
    ),
    "a number and a tensor": Bad(
        ValueError,
        "two numbers or two tensors",
        "both floats or both Tensors",
        {"lr": 0.01, "betas": (0.9, torch.tensor(0.99))},
    ),
    "a tensor and a number": Bad(
        ValueError,
        "two numbers or two tensors",
        "both floats or both Tensors",
        {"lr": 0.01, "betas": (torch.tensor(0.9), 0.99)},
    ),
    "foreach with tensor betas": Bad(
        ValueError,
        "betas as a tensor",
        r"betas\[0\] as a Tensor",
        {"lr": 0.01, "betas": (torch.tensor(0.9), torch.tensor(0.99)), "foreach": True},
    ),
    "no pair of betas": Bad(TypeError, "betas must be a tuple of 2 numbers", "not subscriptable", {"betas": 0.9}),
}
TOGETHER = {
    "fused and foreach": Bad(
        RuntimeError, "fused=True and foreach=True cannot", "`fused` and `foreach`", {"fused": True, "foreach": True}
    ),
    "fused and differentiable": Bad(
        RuntimeError, "fused=True and differentiable=True", "`differentiable`", {"fused": True, "differentiable": True}
    ),
}

ERRORS: dict[str, dict[str, Bad]] = {
    "SGD": {
        **SHARED,
        **TOGETHER,
        "momentum": Bad(ValueError, "momentum must be", "Invalid momentum", {"lr": 0.01, "momentum": -0.5}),
        "nesterov": Bad(ValueError, "nesterov=True needs momentum", "requires a momentum", {"nesterov": True}),
    },
    "Adagrad": {
        **SHARED,
        **TOGETHER,
        "lr_decay": Bad(ValueError, "lr_decay must be", "Invalid lr_decay", {"lr": 0.01, "lr_decay": -0.5}),
    },
    "RMSprop": {
        **SHARED,
        "momentum": Bad(ValueError, "momentum must be", "Invalid momentum", {"lr": 0.01, "momentum": -1.0}),
        "alpha": Bad(ValueError, "alpha must be", "Invalid alpha", {"alpha": -1.0}),
    },
    "Adam": {**SHARED, **TOGETHER, **BETAS},
    "AdamW": {**SHARED, **TOGETHER, **BETAS},
    "Muon": {
        **SHARED,
        "adjust_lr_fn": Bad(
            ValueError, "adjust_lr_fn must be one of", "arbitrary is not supported", {"adjust_lr_fn": "arbitrary"}
        ),
        "momentum": Bad(ValueError, "momentum must be", "momentum should be >= 0", {"momentum": -0.5}),
    },
}
"""By torch's class: what must be refused."""

OURS_TAKES = {
    "Muon": {
        "only support 2D parameters": "what is no matrix takes Adam's steps",
        "does not support complex parameters": "a TypeError at construction instead, as for every recipe",
    }
}
"""Error inputs of torch's registry that are answered otherwise here, on purpose."""

Scheduler = Callable[[torch.optim.Optimizer], Any]
SCHEDULERS: dict[str, Scheduler] = {
    "step": lambda o: lr_scheduler.StepLR(o, step_size=10, gamma=0.9),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.9),
    "linear": lambda o: lr_scheduler.LinearLR(o, start_factor=0.4, total_iters=4),
    "constant": lambda o: lr_scheduler.ConstantLR(o, factor=0.4, total_iters=4),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, power=0.9, total_iters=30),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o),
    "multistep": lambda o: lr_scheduler.MultiStepLR(o, [3, 7]),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=20),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=7),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 1e-4, 1e-2, step_size_up=5, cycle_momentum=False),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.01, total_steps=40),
    "one after another": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 5), lr_scheduler.ExponentialLR(o, 0.95)], milestones=[5]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 5), lr_scheduler.ExponentialLR(o, 0.95)]
    ),
}
"""Schedulers, each of which must move every optimizer's learning rate as it moves SGD's."""


def same(a: Any, b: Any) -> bool:
    """Equality of arguments, tensors by value."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b
