"""Learning rates: a short range test, and the search on a grid that measurements use."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from precond.algebra import checks
from precond.analysis.curvature import Objective
from precond.analysis.diagnostics.short import Curve, Make, one_step, points, short_training, trained_copy

_RAMP = (1e-7, 1e2)
_BLOWN = 4.0  # times the lowest smoothed loss: the ramp has gone too far
_SMOOTH = 0.9
_BELOW = 7  # rates that are tried below where the ramp ended, half a decade apart


@dataclass(frozen=True)
class Range:
    """What a range test found.

    Attributes:
        lr: the rate whose short training ended lowest.
        limit: where the loss blew up when the rate was raised from step to step; None: nowhere.
        ramp: (rate, loss of the batch before the step, smoothed) of each step of the ramp.
        curves: the short trainings, by ascending rate.
        steps: of each of them.
    """

    lr: float
    limit: float | None
    ramp: tuple[tuple[float, float], ...]
    curves: tuple[Curve, ...]
    steps: int

    @property
    def best(self) -> Curve:
        """The training at :attr:`lr`."""
        return next(curve for curve in self.curves if curve.lr == self.lr)

    def __str__(self) -> str:
        rows = [f"  {curve.lr:<10.3g} {curve.why or format(curve.final, '.4g')}" for curve in self.curves]
        end = "did not blow up" if self.limit is None else f"blew up at {self.limit:.2g}"
        head = f"The loss {end} when the rate was raised from {self.ramp[0][0]:.0e}; after {self.steps} steps from the start:"
        return "\n".join([head, *rows, f"Learning rate {self.lr:.2g}"])


def lr_range(
    objective: Objective,
    make: Make,
    *,
    steps: int = 40,
    ramp_steps: int = 100,
    seed: int = 0,
    watch: Callable[[str], None] | None = None,
) -> Range:
    r"""A learning rate for an optimizer, from short trainings of copies of the model.

    First the rate is raised from 1e-7 to 100, by a constant factor per step, until the smoothed loss is four times its lowest (Smith, 2017).
    Then the model is trained from its start for ``steps`` steps at rates half a decade apart, from there downwards, until two
    in a row end higher than the best. The rate that ends lowest is taken: best for trainings of about that length, where longer ones with a
    decay often bear more. Nothing about the model or the random state changes.

    Args:
        objective: what is trained: its batches are taken in turn.
        make: (model, lr) ↦ optimizer.
        steps: of each short training, as many as there is time for.
        ramp_steps: of the ramp.
        seed: of dropout.
        watch: called before each training, with words.

    Returns:
        A :class:`Range`.

    Raises:
        ValueError: where no rate makes the loss lower, or a number is not positive.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0], [-1.0]])
        >>> objective = Objective(torch.nn.Linear(1, 1), torch.nn.functional.mse_loss, [(x, 3 * x)])
        >>> found = lr_range(objective, lambda model, lr: torch.optim.SGD(model.parameters(), lr=lr))
        >>> 0.1 < found.lr < 1 < found.limit  # steps grow from 1 = 2/λ_max on
        True

    References:
        Smith, Cyclical learning rates for training neural networks (2017), section 3.3.
    """
    checks.positive("lr_range", steps=steps, ramp_steps=ramp_steps)
    if watch is not None:
        watch("raising the rate")
    ramp, limit = _ramp(objective, make, ramp_steps, seed)
    top = _half_decade(limit if limit is not None else _RAMP[1])

    def train(lr: float) -> Curve:
        if watch is not None:
            watch(f"learning rate {lr:.2g}")
        return short_training(objective, make, lr, steps, at=points(steps, min(steps, 30)), seed=seed)

    curves: list[Curve] = []
    for k in range(top, top - 3 * _BELOW, -1):
        curves.append(train(rate(k)))
        best = min(range(len(curves)), key=lambda i: curves[i].final)
        if math.isfinite(curves[best].final) and len(curves) - 1 - best >= 2:
            break
    best_curve = min(curves, key=lambda curve: curve.final)
    start = best_curve.losses[0]
    if not math.isfinite(start):
        raise ValueError(
            f"lr_range: the loss is {start} before the first step; look at the data, the loss function and the parameters"
        )
    if not best_curve.final < start:
        raise ValueError(
            f"lr_range: no rate from {curves[-1].lr:.1e} to {curves[0].lr:.1e} makes the loss lower than {start:.4g} in {steps} steps; "
            "give more steps, or look for what is wrong with data or loss"
        )
    return Range(best_curve.lr, limit, ramp, tuple(curves[::-1]), steps)


def rate(k: int) -> float:
    """10^(k/2) to two digits.

    Example:
        >>> [rate(k) for k in (-3, -2, -1, 0)]
        [0.032, 0.1, 0.32, 1.0]
    """
    return float(f"{10 ** (k / 2):.2g}")


def _half_decade(lr: float) -> int:
    return math.floor(2 * math.log10(lr))


def _ramp(objective: Objective, make: Make, steps: int, seed: int) -> tuple[tuple[tuple[float, float], ...], float | None]:
    low, high = _RAMP
    factor = (high / low) ** (1 / max(steps - 1, 1))
    found: list[tuple[float, float]] = []
    with trained_copy(objective, seed) as mine:
        optimizer = make(mine.model, low)
        average, lowest = 0.0, math.inf
        for step in range(steps):
            lr = low * factor**step
            for group in optimizer.param_groups:
                group["lr"] = lr
            try:
                loss = one_step(mine, optimizer, step % len(mine.batches))
            except FloatingPointError:
                return tuple(found), lr
            average = _SMOOTH * average + (1 - _SMOOTH) * loss
            smooth = average / (1 - _SMOOTH ** (step + 1))
            first = abs(found[0][1]) if found else 0.0
            if not math.isfinite(loss) or (smooth > _BLOWN * abs(lowest) + 1e-12 * first and step > 3):
                return tuple(found), lr
            lowest = min(lowest, smooth)
            found.append((lr, smooth))
    return tuple(found), None


def fitted(
    train: Callable[[float], Curve], start: int, horizons: Iterable[int], bounds: tuple[int, int] = (-14, 4)
) -> list[Curve]:
    """Trainings at rates half a decade apart, until for each horizon the lowest loss is at none of the two ends.

    Args:
        train: rate ↦ training.
        start: the first rate is 10^(start/2).
        horizons: in steps.
        bounds: exponents beyond which no one goes.
    """
    horizons, found = tuple(horizons), dict[int, Curve]()
    pending = [start - 1, start, start + 1]
    while pending:
        for k in pending:
            found[k] = train(rate(k))
        low, high, pending = min(found), max(found), []
        for horizon in horizons:
            lowest = {k: _score(curve.until(horizon)) for k, curve in found.items()}
            best = min(lowest, key=lambda k: lowest[k])
            stuck = lowest[best] >= next(iter(found.values())).losses[0]
            if (best == low or stuck) and low > bounds[0]:
                pending.append(low - 1)
            elif best == high and high < bounds[1]:
                pending.append(high + 1)
        pending = sorted(set(pending))
    return [found[k] for k in sorted(found)]


def _score(curve: Curve) -> float:
    return curve.lowest
