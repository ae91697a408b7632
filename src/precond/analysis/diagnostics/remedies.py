"""Remedies: what each does to coordinates, how it is made, and its line of code."""

from __future__ import annotations

import copy
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import precond.optim.preconditioners as choices
from precond.analysis.curvature import Objective
from precond.optim import recipes
from precond.optim.momentum import Momentum
from precond.optim.optimizer import PreconditionedGD
from precond.optim.preconditioners import BNP, Preconditioner, Whitening

INPUTS: dict[str, type[Preconditioner]] = {"bnp": BNP, "whitened": Whitening}
"""Remedies that are coordinates of layer inputs, by the name of their coordinates."""

# Of other classes the nearest of ours: what their P has in common.
_FAMILIES = {
    "SGD": "sgd", "Adam": "adam", "AdamW": "adamw", "NAdam": "adam", "RAdam": "adam", "Adamax": "adam",
    "RMSprop": "rmsprop", "Adagrad": "adagrad",
}  # fmt: skip
_NEAR = 0.3  # of 0 and of 1: data whose means and standard deviations are as near are standardized already
_DIAGONAL = {"rmsprop": "RMS(bias_correction=False)", "adagrad": "AdaGrad()"}
_CARRIED = {"sgd": ("momentum", "weight_decay"), "adam": ("betas", "weight_decay"), "adamw": ("betas", "weight_decay")}
_USUAL: dict[str, Mapping[str, Any]] = {
    "sgd": {"momentum": 0.0, "weight_decay": 0.0}, "adam": {"betas": (0.9, 0.999), "weight_decay": 0.0},
    "adamw": {"betas": (0.9, 0.999), "weight_decay": 1e-2},
}  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """An optimizer that can be made at any learning rate, and data that may have to be prepared.

    Attributes:
        name: ``"now"``, ``"standardize"``, ``"bnp"`` or ``"whitened"``.
        label: in a few words.
        make: (model, lr) ↦ optimizer.
        line: its code, with ``{lr}`` in place of the learning rate.
        prepare: changes the data; None: they stay.
        before: code that belongs before, where data change.
    """

    name: str
    label: str
    make: Callable[[nn.Module, float], torch.optim.Optimizer] = field(repr=False)
    line: str
    prepare: Callable[[Objective], Objective] | None = field(default=None, repr=False)
    before: str = ""

    def code(self, lr: float | None) -> str:
        """All of it; ``lr=...`` where none is known."""
        line = _folded(self.line.replace("{lr}", "..." if lr is None else f"{lr:.2g}"))
        return f"{self.before}\n{line}" if self.before else line


def _folded(line: str, width: int = 76) -> str:
    """A call on several lines where it is longer than one."""
    if len(line) <= width or not line.endswith(")"):
        return line
    head, _, arguments = line[:-1].partition("(")
    wrapped = textwrap.wrap(arguments, width, initial_indent="    ", subsequent_indent="    ", break_long_words=False)
    return "\n".join([f"{head}(", *wrapped, ")"])


@dataclass(frozen=True)
class Base:
    """What one trains with now.

    Attributes:
        family: a recipe's name, or ``""`` for what none resembles.
        options: what of its settings is carried over, where it is not the default.
        optimizer: the user's own, or None for gradient descent with momentum 0.9.
        names: of the model's parameters, by id.
        inputs: what it has of layer inputs already.
    """

    family: str
    options: Mapping[str, Any]
    optimizer: torch.optim.Optimizer | None
    names: Mapping[int, str] = field(default_factory=dict)
    inputs: Preconditioner | None = None

    @property
    def coordinates(self) -> str:
        """In which coordinates of layer inputs it is now: ``"raw"``, ``"bnp"`` or ``"whitened"``."""
        return next((name for name, kind in INPUTS.items() if isinstance(self.inputs, kind)), "raw")

    @property
    def adaptive(self) -> bool:
        """Whether each tensor has a rate of its own, by its gradients."""
        return self.family not in ("sgd", "bnp")

    @property
    def lr(self) -> float:
        """Its learning rate now; of what has none torch's default for the family."""
        if self.optimizer is None:
            return 1e-2
        return max(float(group["lr"]) for group in self.optimizer.param_groups)

    @property
    def label(self) -> str:
        """What it is called."""
        if self.optimizer is None:
            return "gradient descent with momentum 0.9"
        return self.optimizer.naming.name if isinstance(self.optimizer, PreconditionedGD) else type(self.optimizer).__name__

    def now(self) -> Candidate:
        """As it is, at any rate."""
        optimizer = self.optimizer
        if optimizer is None:
            return Candidate("now", self.label, _sgd, "optimizer = torch.optim.SGD(model.parameters(), lr={lr}, momentum=0.9)")
        if isinstance(optimizer, PreconditionedGD) and self.label in recipes.RECIPES:
            options = dict(self.options)
            if (inputs := self.inputs) is not None and "inputs" in signature(recipes.RECIPES[self.label]).parameters:
                options["inputs"] = _Called(type(inputs).__name__, lambda: inputs)
            return Candidate("now", self.label, _recipe(self.label, options), _recipe_line(self.label, options))
        if isinstance(optimizer, PreconditionedGD):
            return Candidate(
                "now", self.label, _again(optimizer, self.names), "for group in optimizer.param_groups: group['lr'] = {lr}"
            )
        shown = "".join(f", {k}={v!r}" for k, v in self.options.items())
        line = f"optimizer = torch.optim.{type(optimizer).__name__}(model.parameters(), lr={{lr}}{shown})"
        if not type(optimizer).__module__.startswith("torch.optim"):
            line = "for group in optimizer.param_groups: group['lr'] = {lr}"
        return Candidate("now", self.label, _again(optimizer, self.names), line)

    def within(self, coordinates: str) -> Candidate:
        """The optimizer in coordinates of layer inputs."""
        inputs = INPUTS[coordinates]
        name = inputs.__name__
        label = f"{name} + {self.label}"
        if self.family in ("adam", "adamw"):
            options = {**self.options, "inputs": _Called(name, inputs)}
            return Candidate(coordinates, label, _recipe(self.family, options), _recipe_line(self.family, options))
        if self.family in _DIAGONAL:
            own = _DIAGONAL[self.family]
            line = f"optimizer = precond.PreconditionedGD(model, lr={{lr}}, preconditioner=precond.{name}() @ precond.{own})"
            second = choices.RMS(bias_correction=False) if self.family == "rmsprop" else choices.AdaGrad()
            return Candidate(
                coordinates, label, lambda m, lr: PreconditionedGD(m, lr=lr, preconditioner=inputs() @ second), line
            )
        momentum = float(self.options.get("momentum", 0.9 if self.optimizer is None else 0.0))
        if coordinates == "bnp":
            options = {"momentum": momentum} if momentum else {}
            return Candidate(coordinates, label, _recipe("bnp", options), _recipe_line("bnp", options))
        average = Momentum(momentum, "heavy_ball") if momentum else None
        shown = f', momentum=precond.Momentum({momentum}, "heavy_ball")' if momentum else ""
        line = f"optimizer = precond.PreconditionedGD(model, lr={{lr}}, preconditioner=precond.{name}(){shown})"
        return Candidate(
            coordinates, label, lambda m, lr: PreconditionedGD(m, lr=lr, preconditioner=inputs(), momentum=average), line
        )

    def standardized(self, dim: int | None) -> Candidate:
        """As it is, on standardized data.

        Args:
            dim: of the features; None: every entry of an example is one.
        """
        now = self.now()
        if dim is None:
            first = "mean, std = inputs.mean(0), inputs.std(0)  # of the training data"
        else:
            first = (
                f"dims = [d for d in range(inputs.ndim) if d != {dim}]\n"
                "mean, std = inputs.mean(dims, keepdim=True), inputs.std(dims, keepdim=True)  # of the training data"
            )
        lines = (
            f"{first}\nstd = std.where(std > 1e-6 * mean.abs(), 1)  # of a constant feature\n"
            "inputs = (inputs - mean) / std  # the same for all data"
        )
        label = f"{self.label}, standardized data"
        return Candidate(
            "standardize", label, now.make, now.line, lambda objective: standardized(objective, dim) or objective, lines
        )


def base_of(optimizer: torch.optim.Optimizer | None, model: nn.Module) -> Base:
    """What an optimizer of a model is, for remedies that keep of it what they can."""
    if optimizer is None:
        return Base("sgd", {"momentum": 0.9}, None)
    name = optimizer.naming.name if isinstance(optimizer, PreconditionedGD) else type(optimizer).__name__
    own = name if name in recipes.RECIPES else ""
    family = own or next((_FAMILIES[c.__name__] for c in type(optimizer).__mro__ if c.__name__ in _FAMILIES), "")
    group = max(optimizer.param_groups, key=lambda g: sum(p.numel() for p in g["params"]))
    options = {k: group[k] for k in _CARRIED.get(family, ()) if k in group and group[k] != _USUAL[family][k]}
    names = {id(p): n for n, p in model.named_parameters(remove_duplicate=False)}
    inputs = _of_inputs(optimizer.naming.build(group).preconditioner) if isinstance(optimizer, PreconditionedGD) else None
    return Base(family, options, optimizer, names, inputs)


def _of_inputs(preconditioner: Preconditioner) -> Preconditioner | None:
    """What of it, or within it, standardizes or whitens layer inputs; whitening first, which is more."""
    within = [preconditioner]
    for each in within:
        within += [part for f in fields(each) if isinstance(part := getattr(each, f.name), Preconditioner)]  # type: ignore[arg-type]
    kinds = tuple(INPUTS.values())
    return next((each for kind in reversed(kinds) for each in within if isinstance(each, kind)), None)


@dataclass(frozen=True)
class _Called:
    """An argument that is made anew for every optimizer, and reads as code."""

    name: str
    make: Callable[[], Any]

    def __repr__(self) -> str:
        return f"precond.{self.name}()"


def _sgd(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def _recipe(name: str, options: Mapping[str, Any]) -> Callable[[nn.Module, float], torch.optim.Optimizer]:
    def make(model: nn.Module, lr: float) -> torch.optim.Optimizer:
        made = {k: v.make() if isinstance(v, _Called) else v for k, v in options.items()}
        return recipes.RECIPES[name](model, lr=lr, **made)

    return make


def _recipe_line(name: str, options: Mapping[str, Any]) -> str:
    shown = "".join(f", {k}={v!r}" for k, v in options.items())
    return f"optimizer = precond.{name}(model, lr={{lr}}{shown})"


def _again(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> Callable[[nn.Module, float], torch.optim.Optimizer]:
    """The same class with the same groups on a copy of its model, fresh."""

    def make(model: nn.Module, lr: float) -> torch.optim.Optimizer:
        own = dict(model.named_parameters(remove_duplicate=False))
        groups = [
            {
                **{k: v for k, v in group.items() if k != "params"},
                "lr": lr,
                "params": [own[names[id(p)]] for p in group["params"]],
            }
            for group in optimizer.param_groups
        ]
        return type(optimizer)(groups, lr=lr)  # type: ignore[call-arg]

    return make


def standardized(objective: Objective, dim: int | None) -> Objective | None:
    """The objective on data whose features have mean 0 and standard deviation 1 over all its batches; None where they nearly have.

    Args:
        objective: whose inputs are, or have among them, one tensor of floats per batch.
        dim: of the features; None: every entry of an example is one.

    Raises:
        ValueError: where they have none, or several.
    """
    batches = [objective.batches[i] for i in range(len(objective.batches))]
    numbers = [floats(inputs) for inputs, _ in batches]
    if any(x is None for x in numbers):
        raise ValueError("the data are not one tensor of numbers per batch")
    whole = torch.cat(numbers).double()  # type: ignore[arg-type]
    over = [d for d in range(whole.ndim) if d != (dim % whole.ndim if dim is not None else None)] if dim is not None else [0]
    mean, std = whole.mean(over, keepdim=True), whole.std(over, keepdim=True, correction=0)
    varies = std > 1e-6 * mean.abs()
    if bool(((mean.abs() < _NEAR) & ((std - 1).abs() < _NEAR))[varies].all()):
        return None
    std = torch.where(varies, std, 1.0)
    other = copy.copy(objective)

    def changed(x: Any) -> Any:
        return ((x - mean) / std).to(x.dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    other.batches = [(tree_map(changed, inputs), targets) for inputs, targets in batches]
    return other


def floats(inputs: Any) -> Tensor | None:
    """The tensor of floats among what a batch gives the model; None where there is none, or several: which are data, none knows."""
    found = [x for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.is_floating_point()]
    return found[0] if len(found) == 1 else None
