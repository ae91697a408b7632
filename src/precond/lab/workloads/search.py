"""Search of a learning rate: the same number of trials for everyone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Judge = Literal["validation", "training"]
Aim = Literal["loss", "steps"]

# With few trials in one dimension, evenly spaced ones find more than a sampler does that must first learn where to look.
_ALL_EVEN = 8


@dataclass(frozen=True)
class LogUniform:
    """Learning rates from ``low`` to ``high``, each decade alike.

    Args:
        low, high: ends of the range.
        recommended: the learning rate of the first trial, such as the one that an optimizer is published with, in the range or
            beyond it; None: there is none.

    Example:
        >>> LogUniform(1e-4, 1.0).even(4)
        (0.0003162, 0.003162, 0.03162, 0.3162)
    """

    low: float
    high: float
    recommended: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high < math.inf:
            raise ValueError(f"range of learning rates: need 0 < lowest < highest, got {self.low:g} and {self.high:g}")
        if self.recommended is not None and not 0 < self.recommended < math.inf:
            raise ValueError(f"recommended learning rate: need a number > 0, got {self.recommended:g}")

    def first(self, n: int) -> tuple[float, ...]:
        """The first n trials: the recommended one, and the others evenly spaced.

        Example:
            >>> LogUniform(1e-4, 1.0, recommended=1e-3).first(5)
            (0.001, 0.0003162, 0.003162, 0.03162, 0.3162)
        """
        return self.even(n) if self.recommended is None else (rounded(self.recommended), *self.even(n - 1))

    def even(self, n: int) -> tuple[float, ...]:
        """The middles of n equal parts of the logarithmic scale."""
        decades = math.log10(self.high / self.low)
        return tuple(rounded(self.low * 10 ** (decades * (i + 0.5) / n)) for i in range(n))


@dataclass(frozen=True)
class Trial:
    """One learning rate of a search.

    Attributes:
        lr: it.
        loss: the final one, on the part that judges; NaN where it diverged or failed.
        steps: to the lowest loss of the reference's best trial; None where that was not reached, or is not what the search aims at.
    """

    lr: float
    loss: float
    steps: int | None = None

    @property
    def _place(self) -> tuple[bool, float, float]:
        """What sorts the better before the worse."""
        finite = math.isfinite(self.loss)
        reached = finite and self.steps is not None
        return not finite, float(self.steps or 0) if reached else math.inf, self.loss if finite else self.lr

    @property
    def _value(self) -> float:
        """The same as one number, losses being positive, for a sampler to make small."""
        if not math.isfinite(self.loss):
            return math.inf
        return self.loss if self.steps is None else -1 / (1 + self.steps)


@dataclass(frozen=True)
class Search:
    """How learning rates are searched: the budget is the number of trials, each trained in full.

    The first is the recommended one, where a range has any; the next are evenly spaced: all of up to 8, three quarters of more.
    The rest are drawn by Optuna's TPE sampler from what the trials before them found. Where the best of all lies at an end, the search goes on
    beyond it.

    Args:
        trials: of each entrant.
        seed: of the sampler.
        judge: on what part of the data the final loss of a trial decides: ``"validation"``, or ``"training"``, on examples that are
            trained on too but that no reported curve is evaluated on (where there are enough of them).
        aim: what decides: the final loss, or the steps to the lowest loss of the reference's best trial, and the final loss among those that
            take as many or do not reach it. The reference's own trials are judged by their final loss in any case.
        evaluations: of a trial; steps are those of the first that meets the goal.
        beyond: so many trials more at most while the best lies at an end of those before, each as far from it as the first are from each other.
    """

    trials: int
    seed: int = 0
    judge: Judge = "validation"
    aim: Aim = "loss"
    evaluations: int = 1
    beyond: int = 0

    @property
    def most(self) -> int:
        """Trials at most."""
        return self.trials + self.beyond

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise ValueError(f"trials must be at least 1, got {self.trials}")

    def run(self, space: LogUniform, tried: Callable[[int, float], Trial]) -> tuple[Trial, ...]:
        """All trials, in their order. The same outcomes give the same trials, so that a search can be replayed.

        Args:
            space: where learning rates come from.
            tried: number of a trial and its learning rate ↦ what came of it.

        Raises:
            ImportError: where Optuna is not installed.
        """
        optuna = _optuna()
        even = self.trials if self.trials <= _ALL_EVEN else math.ceil(0.75 * self.trials)
        first = space.first(even)
        low, high = min(space.low, *first), max(space.high, *first)
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=self.seed, n_startup_trials=even))
        for lr in first:
            study.enqueue_trial({"lr": lr})
        found = []
        for number in range(self.trials):
            asked = study.ask()
            found.append(tried(number, rounded(asked.suggest_float("lr", low, high, log=True))))
            study.tell(asked, found[-1]._value)
        spacing = 10 ** (math.log10(space.high / space.low) / max(1, even - (space.recommended is not None)))
        while len(found) < self.most and (farther := _beyond(found, spacing)) is not None:
            found.append(tried(len(found), farther))
        return tuple(found)


def _beyond(found: Sequence[Trial], spacing: float) -> float | None:
    """The next rate beyond the best of these; None where that lies between others, or where none finished."""
    rates, chosen = [trial.lr for trial in found], best(found)
    if not any(math.isfinite(trial.loss) for trial in found):
        return None
    if chosen == max(rates):
        return rounded(chosen * spacing)
    return rounded(chosen / spacing) if chosen == min(rates) else None


def best(trials: Iterable[Trial]) -> float:
    """The learning rate with the fewest steps to the goal, or the lowest loss; where every trial diverged, the smallest.

    Example:
        >>> best((Trial(0.1, 2.0), Trial(0.2, 1.0), Trial(0.4, math.nan)))
        0.2
        >>> best((Trial(0.1, 2.0, steps=30), Trial(0.2, 1.0, steps=50), Trial(0.4, 0.5)))
        0.1
    """
    return min(trials, key=lambda trial: trial._place).lr


def rounded(lr: float) -> float:
    """To four significant digits, so that what is printed is what is used."""
    return float(f"{lr:.4g}")


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ImportError(
            "a search of the learning rate needs Optuna; install it: pip install 'precond[cli]', or give --lr"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
