"""The open question: does regularizing in z beat regularizing in p? A study on small data, with equal budgets.

Every training is a function of setting, method, learning rate, strength and seed; a method's search and its final seeds are one
:class:`Result`, which is what is kept.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Literal

import torch
from torch import Tensor, nn

from precond.algebra import vec
from precond.algebra.spaces import Cotangent, Tangent, Term
from precond.lab.evidence.problems import raw
from precond.optim.optimizer import PreconditionedGD
from precond.optim.recipes import adagrad, adam, bnp
from precond.optim.regularizers import L2, SAM, At, GradientNorm, Regularizer

EPOCHS = 60
LENGTHS = (0.05, 0.1, 0.2, 0.5, 1.0)
DECAYS = {"p": (1e-5, 1e-4, 1e-3, 1e-2, 1e-1), "z": (1e-4, 1e-3, 1e-2, 1e-1, 1.0)}
# λ in p; in z, k = 4λ/α, the multiple of the penalty that plain preconditioned descent implies.
NORMS = {"p": (1e-3, 1e-2, 1e-1, 1.0, 10.0), "z": (2**-12, 2**-8, 2**-4, 1.0, 16.0)}
FACTORS = (2, 4)
SEARCH_SEEDS, SEEDS = (100, 101), tuple(range(8))
# Two-sided 95 % quantile of Student's t with 7 degrees of freedom.
_T = 2.365

Space = Literal["p", "z"]
Data = Callable[[], tuple[Tensor, Tensor]]


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
    """A penalty as a function of its strength and the learning rate, and the strengths that are tried."""

    label: str
    penalty: Callable[[float, float], Sequence[Regularizer]]
    strengths: tuple[float, ...]


def _none(strength: float, lr: float) -> Sequence[Regularizer]:
    return ()


def _l2(space: Space, strength: float, lr: float) -> Sequence[Regularizer]:
    return (L2(strength, space=space),)


def _ascent(space: Space, beta: float, damping: float, strength: float, lr: float) -> Sequence[Regularizer]:
    return (Ascent(strength, space, damping=damping, beta=beta),)


def _norm(space: Space, damping: float, strength: float, lr: float) -> Sequence[Regularizer]:
    # With one more gradient; α is the first learning rate, so that λ stays while α falls, in both spaces.
    return (GradientNorm(strength * (lr / 4 if space == "z" else 1.0), space, damping=damping),)


def methods() -> tuple[Method, ...]:
    """None; L2, SAM and gradient norms in p, in z, and in z with M damped inside the penalty."""
    found = [Method("none", _none, LENGTHS[:1])]
    found += [Method(f"L2 in {space}", partial(_l2, space), DECAYS[space]) for space in ("p", "z")]
    ascents = (("SAM", 1.0), ("gradient norm of length ρ", 0.5))
    for name, beta in ascents:
        found.append(Method(f"{name} in p", partial(_ascent, "p", beta, 0.0), LENGTHS))
        found += [Method(f"{name} in z, δ = {d:g}", partial(_ascent, "z", beta, d), LENGTHS) for d in (0.0, 0.1, 1.0)]
    found.append(Method("λ‖∇L‖² in p", partial(_norm, "p", 0.0), NORMS["p"]))
    found += [Method(f"λ‖∇L‖² in z, δ = {d:g}", partial(_norm, "z", d), NORMS["z"]) for d in (0.0, 0.1, 1.0)]
    return tuple(found)


@dataclass(frozen=True)
class Setting:
    """Data, a network with one hidden layer of ReLU, and an optimizer.

    Attributes:
        name: of data and optimizer.
        data: features (N, n) and classes (N,).
        sizes: examples for training, for the search's validation and at most for the test; each seed draws its own.
        batch: examples of a batch.
        optimizer: of a model, a learning rate and ``regularizers``.
        rates: learning rates that are tried.
        standardize: the inputs, by the training part.
        hidden: units.
    """

    name: str
    data: Data
    sizes: tuple[int, int, int]
    batch: int
    optimizer: Callable[..., PreconditionedGD]
    rates: tuple[float, float, float]
    standardize: bool = False
    hidden: int = 64


def _digits() -> tuple[Tensor, Tensor]:
    x, y = raw("digits", constant=True)
    return x.float() / 16, y


def _cancer() -> tuple[Tensor, Tensor]:
    x, y = raw("breast cancer")
    return x.float(), y


def settings(fashion: Data) -> tuple[Setting, ...]:
    """Digits with Adam, AdaGrad and BNP, breast cancer and few images of Fashion-MNIST with Adam.

    Args:
        fashion: gives the images of Fashion-MNIST that are drawn from, flattened, and their classes.
    """
    small = (200, 400, 1197)
    return (
        Setting("digits-adam", _digits, small, 40, adam, (3e-3, 1e-2, 3e-2)),
        Setting("breast-cancer-adam", _cancer, (100, 200, 269), 20, adam, (1e-3, 3e-3, 1e-2), standardize=True),
        Setting("fashion-mnist-adam", fashion, (500, 500, 2000), 50, adam, (5e-4, 1.5e-3, 5e-3)),
        Setting("digits-bnp", _digits, small, 40, partial(bnp, momentum=0.9), (3e-3, 1e-2, 3e-2)),
        Setting("digits-adagrad", _digits, small, 40, adagrad, (3e-2, 1e-1, 3e-1)),
    )


@dataclass(frozen=True)
class Score:
    """Of one training, at its end."""

    validation: float
    test: float
    accuracy: float


@dataclass(frozen=True)
class Trial:
    """A setting of the search and its mean loss on the validation part, ∞ where a training diverged."""

    lr: float
    strength: float
    loss: float


@dataclass(frozen=True)
class Result:
    """A method at its best setting.

    Attributes:
        setting, method: names.
        lr: the learning rate found on the validation part.
        strength: the strength found there.
        trials: what was tried.
        scores: one per seed, none of which took part in the search.
        stronger: test losses at each of ``FACTORS`` times the strength, one per seed.
    """

    setting: str
    method: str
    lr: float
    strength: float
    trials: tuple[Trial, ...]
    scores: tuple[Score, ...]
    stronger: tuple[tuple[float, ...], ...]


def train(setting: Setting, method: Method, lr: float, strength: float, seed: int) -> Score:
    """A training; split, first weights and batches are those of the seed, for every method."""
    draw = torch.Generator().manual_seed(seed)
    x, y = setting.data()
    parts = torch.randperm(len(x), generator=draw)[: sum(setting.sizes)].split(setting.sizes)
    if setting.standardize:
        x = (x - x[parts[0]].mean(0)) / x[parts[0]].std(0, correction=0).clamp_min(1e-12)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(x.shape[1], setting.hidden), nn.ReLU(), nn.Linear(setting.hidden, int(y.max()) + 1))
    optimizer = setting.optimizer(model, lr, regularizers=method.penalty(strength, lr))
    batches = -(-len(parts[0]) // setting.batch)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, EPOCHS * batches)

    def backward(batch: Tensor) -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()

    for _ in range(EPOCHS):
        for batch in parts[0][torch.randperm(len(parts[0]), generator=draw)].split(setting.batch):
            backward(batch)
            while optimizer.probe():
                backward(batch)
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        outs = [model(x[part]) for part in parts[1:]]
        losses = [float(nn.functional.cross_entropy(out, y[part])) for out, part in zip(outs, parts[1:], strict=True)]
        accuracy = float((outs[1].argmax(1) == y[parts[2]]).double().mean())
    return Score(losses[0], losses[1], accuracy)


def result(setting: Setting, method: Method) -> Result:
    """A search on the validation part, then other seeds at what it found and at multiples of the strength."""
    rates: Sequence[float] = setting.rates
    if len(method.strengths) == 1:  # as many trials as the others
        rates = [setting.rates[1] * 10 ** (k / 7 - 1) for k in range(len(setting.rates) * len(LENGTHS))]
    trials = []
    for lr, strength in product(rates, method.strengths):
        losses = [train(setting, method, lr, strength, seed).validation for seed in SEARCH_SEEDS]
        trials.append(Trial(lr, strength, statistics.fmean(losses) if all(map(math.isfinite, losses)) else math.inf))
    best = min(trials, key=lambda trial: trial.loss)
    scores = tuple(train(setting, method, best.lr, best.strength, seed) for seed in SEEDS)
    stronger = tuple(
        tuple(train(setting, method, best.lr, factor * best.strength, seed).test for seed in SEEDS)
        for factor in (FACTORS if len(method.strengths) > 1 else ())
    )
    return Result(setting.name, method.label, best.lr, best.strength, tuple(trials), scores, stronger)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % confidence interval, of as many values as there are seeds; ∞ where one is not finite."""
    if not all(map(math.isfinite, values)):
        return math.inf, math.nan
    return statistics.fmean(values), _T * statistics.stdev(values) / len(values) ** 0.5


def difference(z: Sequence[float], p: Sequence[float]) -> tuple[float, float]:
    """Of two methods' losses, seed by seed, with its interval."""
    return interval([a - b for a, b in zip(z, p, strict=True)])
