r"""Gains: what a remedy is predicted to save, as an interval that trainings have confirmed or refuted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from precond.algebra.vec import Vec
from precond.analysis.curvature import Objective
from precond.analysis.diagnostics.calibrated import STUCK
from precond.analysis.diagnostics.findings import units
from precond.analysis.diagnostics.gathering import gather
from precond.analysis.diagnostics.quadratic_model import LossDecay, Part, parts_of, speed_up
from precond.analysis.diagnostics.remedies import Base, floats, standardized
from precond.analysis.diagnostics.short import as_trained
from precond.analysis.diagnostics.streaming import InputStatistics


@dataclass(frozen=True)
class QuadraticModel:
    """What predictions are made of.

    Attributes:
        parts: of the network.
        standardized: the same on standardized data; None where they are no numbers, or standardized already. Standardized data are
            the coordinates of :class:`precond.BNP` in the layers that receive them; where no layer with a bias does, where a normalization
            behind such a layer takes scales or means out again, or units are stuck, which other data free, this is made anew.
        stuck: the share of hidden units that are saturated or dead: what they receive tells nothing of what they will.
        freed: that share on standardized data.
        start: the loss before training over that on standardized data, from which training starts there.
        why: nothing is known of standardized data.
    """

    parts: Sequence[Part]
    standardized: Sequence[Part] | None
    stuck: float
    freed: float
    start: float = 1.0
    why: str = ""

    @staticmethod
    def of(objective: Objective, **options: Any) -> QuadraticModel:
        """Of an objective."""
        with as_trained(objective) as seen:
            gathered, _ = gather(seen, **{**_DEFAULTS, **options})
            return QuadraticModel.made(seen, gathered, seen.gradient(), **options)

    @staticmethod
    def made(objective: Objective, gathered: Sequence[InputStatistics], g: Vec, **options: Any) -> QuadraticModel:
        """Of what was gathered on an objective, and its gradient."""
        parts, stuck = parts_of(_cheap(objective, gathered), gathered, g), _stuck(gathered)
        if not gathered or floats(objective.batches[0][0]) is None:
            return QuadraticModel(parts, None, stuck, math.nan, why="what a batch gives the model is not one tensor of floats")
        # Also where a normalization comes first: one per example does not take the features' scales away.
        changed = standardized(objective, features(objective, gathered[0]))
        if changed is None:
            return QuadraticModel(parts, None, stuck, math.nan, why="the data are standardized already")
        direct = any(part.data for part in parts) and not any(seen.source == "data" and seen.rescaled for seen in gathered)
        again = gather(changed, **{**_DEFAULTS, **options})[0] if stuck or not direct else gathered
        if direct and stuck < STUCK:
            other = [replace(p, blocks={**p.blocks, "raw": p.blocks["bnp"]}) if p.data else p for p in parts]
        else:
            other = parts_of(_cheap(changed, again), again, changed.gradient())
        losses = objective.value(), changed.value()
        return QuadraticModel(parts, other, stuck, _stuck(again), losses[0] / losses[1] if min(losses) > 0 else 1.0)


def _cheap(objective: Objective, gathered: Sequence[InputStatistics]) -> Objective:
    """The objective on its first batches, as many as its value is cheap on: each layer's curvature takes a few of them."""
    entries, rows = sum(p.numel() for p in objective.params), max((seen.count for seen in gathered), default=1)
    count = max(1, int(_WORK * len(objective.batches) / (entries * rows)))
    return objective if count >= len(objective.batches) else objective.first(count)


_WORK = 3e10
"""Parameters times inputs (examples, or examples and positions) of one value of the loss."""


def _stuck(gathered: Iterable[InputStatistics]) -> float:
    counts = [units(seen) for seen in gathered if seen.source != "data"]
    return sum(u.saturated + u.dead for u in counts) / max(sum(u.total for u in counts), 1)


_DEFAULTS = {"samples": 16384, "max_inputs": 2048}


def features(objective: Objective, first: InputStatistics) -> int | None:
    """The dimension of the data along which a layer that receives them has its features; None where every entry is one."""
    inputs = floats(objective.batches[0][0])
    shape = torch.Size() if inputs is None else inputs.shape
    if len(shape) < 3 or first.n == shape[1:].numel():
        return None
    return 1 if first.channel is not None or first.kernel > 1 else len(shape) - 1


def steps(kappa: float) -> float:
    """Steps in which gradient descent at its best learning rate reduces the error by e, one at least: 1/log((κ + 1)/(κ − 1)).

    Example:
        >>> round(steps(101.0), 1), steps(1.0)
        (50.5, 1.0)
    """
    return 1.0 if kappa <= 1 else max(1.0, 1 / (math.log1p(2 / (kappa - 1))))


def predicted(quadratic: QuadraticModel, base: Base, remedy: str, horizon: int) -> tuple[float, float]:
    """The ratio of steps without and with a remedy by the quadratic model of the whole network, and by κ of the layer that gains most.

    An adaptive optimizer's diagonal P is on neither side: with a remedy it would be another one, which nobody knows yet.

    Args:
        quadratic: of the network.
        base: what one trains with: in which coordinates of inputs it is, and whether each tensor has a rate of its own.
        remedy: ``"standardize"``, or the coordinates that layers get.
        horizon: steps of the training that is meant.
    """
    before, after = base.coordinates, base.coordinates if remedy == "standardize" else remedy
    others = quadratic.standardized if remedy == "standardize" else quadratic.parts
    if others is None:
        return math.nan, math.nan
    with_it = {part.name: part for part in others}
    kappas = [
        steps(_kappa(part, before)) / steps(min(_kappa(part, before), _kappa(with_it[part.name], after)))
        for part in quadratic.parts
        if part.name in with_it
    ]
    decays = LossDecay(quadratic.parts, before, base.adaptive), LossDecay(others, after, base.adaptive)
    return speed_up(*decays, horizon, quadratic.start if remedy == "standardize" else 1.0), max(kappas, default=1.0)


def first_rate(quadratic: QuadraticModel, base: Base, remedy: str) -> float:
    """A learning rate to start from: 1/λ_max of the quadratic model in the remedy's coordinates; of an adaptive optimizer its own.

    Gradient descent with momentum β of full gradients goes 1/(1 − β) times as far.
    """
    if base.adaptive:
        return base.lr
    name, parts = (base.coordinates, quadratic.standardized) if remedy == "standardize" else (remedy, quadratic.parts)
    chosen = [(part.s, part.blocks.get(name, part.blocks["raw"])) for part in parts or ()]
    largest = max((s * float(block.values.max()) for s, block in chosen), default=1.0)
    return (1 - float(base.options.get("momentum", 0.0))) / largest


def _kappa(part: Part, name: str) -> float:
    values = part.blocks.get(name, part.blocks["raw"]).values
    return float(values.max() / values.min())
