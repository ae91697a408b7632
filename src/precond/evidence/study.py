"""The open question: does regularizing in z beat regularizing in p? A small study on few digits, with equal budgets.

Perturbations have a stated Euclidean length in p whatever the space of the penalty is, so that p and z differ by their direction alone.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Literal

import torch
from torch import Tensor, nn

from precond import vec
from precond.evidence.problems import raw
from precond.recipes import adam
from precond.regularizers import L2, SAM, At, Regularizer
from precond.spaces import Cotangent, Tangent, Term

TRAIN, VALIDATION = 200, 400
BATCH, EPOCHS = 40, 60
LEARNING_RATES = (3e-3, 1e-2, 3e-2)
LENGTHS = (0.1, 0.2, 0.5, 1.0)
DECAYS = {"p": (1e-5, 1e-4, 1e-3, 1e-2), "z": (1e-3, 1e-2, 1e-1, 1.0)}
SEARCH_SEEDS, SEEDS = (100, 101), tuple(range(8))
# Two-sided 95 % quantiles of Student's t with 7 degrees of freedom.
_T = 2.365


@dataclass(frozen=True)
class Ascent(SAM):
    """g + β[g(p + δ) − g] with δ along the space's steepest ascent and ‖δ‖ = ``rho`` in p: SAM for β = 1, a gradient norm for β < 1."""

    beta: float = 1.0

    replaces_gradient = False

    def probe(self, at: At) -> tuple[Tangent, ...]:
        sharp = at.space.sharp(at.g)
        return (Tangent(sharp, at["rho"][0] / at.sums.norm(sharp).clamp_min(torch.finfo(at.dtype).tiny)),)

    def term(self, at: At) -> Term:
        return Cotangent(vec.scale(vec.sub(at.found[0], at.g), self.beta))


@dataclass(frozen=True)
class Method:
    """A penalty of some strength, and the strengths that are tried."""

    label: str
    penalty: Callable[[float], Sequence[Regularizer]]
    strengths: tuple[float, ...]


def _ascent(space: Literal["p", "z"], beta: float, damping: float, length: float) -> Sequence[Regularizer]:
    return (Ascent(length, space, damping=damping, beta=beta),)


def methods() -> tuple[Method, ...]:
    """None; L2, SAM and gradient norms in p, in z, and in z with M damped inside the penalty."""
    found = [
        Method("none", lambda _: (), LENGTHS[:1]),
        Method("L2 in p", lambda x: (L2(x, space="p"),), DECAYS["p"]),
        Method("L2 in z", lambda x: (L2(x, space="z"),), DECAYS["z"]),
    ]
    for name, beta, dampings in (("SAM", 1.0, (0.0, 0.1, 1.0)), ("gradient norm, β = ½", 0.5, (0.0, 0.1))):
        found.append(Method(f"{name} in p", partial(_ascent, "p", beta, 0.0), LENGTHS))
        found += [Method(f"{name} in z, δ = {d:g}", partial(_ascent, "z", beta, d), LENGTHS) for d in dampings]
    return tuple(found)


@dataclass(frozen=True)
class Score:
    """Of one training, at its end."""

    validation: float
    test: float
    accuracy: float


@dataclass(frozen=True)
class Result:
    """A method at its best setting.

    Attributes:
        method: its label.
        lr: the learning rate found on the validation part.
        strength: the strength found there.
        trials: settings tried.
        scores: one per seed, none of which took part in the search.
        doubled: test losses at twice the strength, one per seed.
    """

    method: str
    lr: float
    strength: float
    trials: int
    scores: tuple[Score, ...]
    doubled: tuple[float, ...]


def train(method: Method, lr: float, strength: float, seed: int) -> Score:
    """A training of 64–64–10 with ReLU on 200 digits; split, first weights and batches are those of the seed, for every method."""
    draw = torch.Generator().manual_seed(seed)
    x, y = (t.float() / 16 if t.is_floating_point() else t for t in raw("digits", constant=True))
    order = torch.randperm(len(x), generator=draw)
    part = {"train": order[:TRAIN], "validation": order[TRAIN : TRAIN + VALIDATION], "test": order[TRAIN + VALIDATION :]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    penalty = method.penalty(strength)
    optimizer = adam(model, lr, regularizers=penalty)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, EPOCHS * (TRAIN // BATCH))

    def backward(batch: Tensor) -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()

    for _ in range(EPOCHS):
        for batch in part["train"][torch.randperm(TRAIN, generator=draw)].split(BATCH):
            backward(batch)
            while optimizer.probe():
                backward(batch)
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        out = {name: model(x[i]) for name, i in part.items()}
        loss = {name: float(nn.functional.cross_entropy(out[name], y[part[name]])) for name in out}
        accuracy = float((out["test"].argmax(1) == y[part["test"]]).double().mean())
    return Score(loss["validation"], loss["test"], accuracy)


def results(only: Sequence[Method] | None = None) -> Iterator[Result]:
    """Each method: a search on the validation part, then other seeds at what it found and at twice the strength."""
    for method in methods() if only is None else only:
        rates: tuple[float, ...] = LEARNING_RATES
        if len(method.strengths) == 1:  # as many trials as the others
            rates = tuple(1e-3 * 10 ** (k / 6) for k in range(12))
        grid = list(product(rates, method.strengths))

        def mean_loss(setting: tuple[float, float], method: Method = method) -> float:
            losses = [train(method, *setting, seed).validation for seed in SEARCH_SEEDS]
            return statistics.fmean(losses) if all(map(math.isfinite, losses)) else math.inf

        lr, strength = min(grid, key=mean_loss)
        scores = tuple(train(method, lr, strength, seed) for seed in SEEDS)
        doubled = tuple(train(method, lr, 2 * strength, seed).test for seed in SEEDS)
        yield Result(method.label, lr, strength, len(grid), scores, doubled)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % confidence interval, of as many values as there are seeds."""
    return statistics.fmean(values), _T * statistics.stdev(values) / len(values) ** 0.5


def difference(a: Result, b: Result) -> tuple[float, float]:
    """Of the test losses of two methods, seed by seed, with its interval."""
    return interval([x.test - y.test for x, y in zip(a.scores, b.scores, strict=True)])
