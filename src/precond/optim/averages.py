"""Averages of the weights, at which a model is evaluated, and the one from which its gradients are taken further ahead."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from precond.algebra import checks
from precond.optim.blocks import Rule
from precond.optim.checking.arguments import settle


class WeightAverage(ABC):
    r"""A frozen choice of an average e of the weights x that steps end at: e ← e + s(x − e) after a step.

    Gradients are taken at y = x + c(x − e), which is where the parameters are between steps; models are evaluated at (1−λ)x + λe, where
    ``with optimizer.averaged():`` puts them. A new one is a frozen dataclass with :meth:`share`.

    Attributes:
        start: the first step whose weights count.
        where: which parameters are averaged; None: all.
        blend: λ.
        lead: c.

    Example:
        >>> import precond
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Last(precond.WeightAverage):  # e = x: no average at all
        ...     def share(self, seen):
        ...         return 1.0
        >>> Last().share(7)
        1.0

    References:
        Polyak & Juditsky (1992).
    """

    start: int = 1
    where: Rule | None = None
    blend: float = 1.0
    lead: float = 0.0

    @abstractmethod
    def share(self, seen: int) -> float:
        """s of weights before which so many were folded in; 1 of the first."""

    def _check(self) -> None:
        who = type(self).__name__
        checks.whole(who, start=self.start)
        if not 0 <= self.blend <= 1:
            raise ValueError(f"{who}: blend must be in [0, 1], got {self.blend!r}; 1 evaluates the average itself")


@dataclass(frozen=True)
class EMA(WeightAverage):
    r"""The exponential moving average, s = max(1 − ρ, 1/n) for the n-th weights: their mean at first, so that there is no bias to correct.

    Args:
        decay: ρ in [0, 1); a mean of the last 1/(1−ρ) steps, about.
        start: the first step whose weights count; of training's last part alone it is the average of a tail.
        blend: λ in [0, 1] of (1−λ)x + λe, the weights to evaluate at.
        where: which parameters are averaged; None: all.

    Example:
        >>> import torch, precond
        >>> p = torch.nn.Parameter(torch.tensor([0.0]))
        >>> optimizer = precond.sgd([p], lr=1.0, average=precond.EMA(0.5))
        >>> for _ in range(3):
        ...     p.grad = torch.tensor([-1.0]); _ = optimizer.step()
        >>> with optimizer.averaged():
        ...     print(round(p.item(), 4))  # of 1, 2, 3: s = 1, 1/2, 1/2
        2.25

    References:
        Polyak & Juditsky (1992); Tarvainen & Valpola (2017) for the exponential form.
    """

    decay: float = 0.999
    start: int = 1
    blend: float = 1.0
    where: Rule | None = None

    def __post_init__(self) -> None:
        settle(self)
        checks.fraction("EMA", decay=self.decay)
        self._check()

    def share(self, seen: int) -> float:
        return max(1 - self.decay, 1 / (seen + 1))


@dataclass(frozen=True)
class TailMean(WeightAverage):
    r"""The mean of all weights from a step on, s = 1/n for the n-th.

    Args:
        start: the first step whose weights count.
        blend: λ in [0, 1] of (1−λ)x + λe, the weights to evaluate at.
        where: which parameters are averaged; None: all.

    Example:
        >>> import torch, precond
        >>> p = torch.nn.Parameter(torch.tensor([0.0]))
        >>> optimizer = precond.sgd([p], lr=1.0, average=precond.TailMean(start=2))
        >>> for _ in range(3):
        ...     p.grad = torch.tensor([-1.0]); _ = optimizer.step()
        >>> with optimizer.averaged():
        ...     print(round(p.item(), 4))  # of 2 and 3
        2.5

    References:
        Ruppert (1988); Polyak & Juditsky (1992); Izmailov et al. (2018), SWA; Jain et al. (2018) for tails.
    """

    start: int
    blend: float = 1.0
    where: Rule | None = None

    def __post_init__(self) -> None:
        settle(self)
        self._check()

    def share(self, seen: int) -> float:
        return 1 / (seen + 1)


@dataclass(frozen=True)
class PolynomialAverage(WeightAverage):
    r"""The mean that remembers a fixed part of training: s = (η+1)/(n+η) for the n-th weights.

    The i-th of n weights counts in proportion to i(i+1)⋯(i+η−1), about i^η, so that the mean is one of about the last n/(η+1) steps,
    however long training is: nothing is to be set to its length, and what is far behind is forgotten. η = 0 is the mean of all weights.

    Args:
        power: η ≥ 0.
        start: the first step whose weights count.
        blend: λ in [0, 1] of (1−λ)x + λe, the weights to evaluate at.
        where: which parameters are averaged; None: all.

    Example:
        >>> import torch, precond
        >>> p = torch.nn.Parameter(torch.tensor([0.0]))
        >>> optimizer = precond.sgd([p], lr=1.0, average=precond.PolynomialAverage(power=1))
        >>> for _ in range(3):
        ...     p.grad = torch.tensor([-1.0]); _ = optimizer.step()
        >>> with optimizer.averaged():
        ...     print(round(p.item(), 4))  # (1·1 + 2·2 + 3·3)/(1 + 2 + 3)
        2.3333

    References:
        Shamir & Zhang (2013): polynomial-decay averaging.
    """

    power: float = 9.0
    start: int = 1
    blend: float = 1.0
    where: Rule | None = None

    def __post_init__(self) -> None:
        settle(self)
        checks.non_negative("PolynomialAverage", power=self.power)
        self._check()

    def share(self, seen: int) -> float:
        return (self.power + 1) / (seen + 1 + self.power)


@dataclass(frozen=True)
class EMANesterov(WeightAverage):
    r"""Nesterov's lookahead along an average of moves: gradients at y = x + βm, m ← γm + (1−γ)(x′ − x), x → x′ the step from y.

    m is the move of the moving average e of x with decay γ: from m = 0 and e = x follows m = e′ − e = (x′ − e′)(1−γ)/γ, so that
    y = x + c(x − e) with c = β(1−γ)/γ, and one average is all that is kept. Models are evaluated at x.

    Args:
        lookahead: β ≥ 0; 0.3 to 0.6 of about 100 steps' mean move is usual.
        decay: γ in (0, 1).
        start: the first step whose weights count.
        where: which parameters; None: all.

    Example:
        >>> import precond
        >>> average = precond.EMANesterov(lookahead=0.3, decay=0.99)
        >>> round(average.lead, 6), average.share(0), round(average.share(1), 6)  # c = β(1−γ)/γ, and s
        (0.00303, 1.0, 0.01)

    References:
        Nesterov (1983); EMA-Nesterov (2026, arXiv:2605.25395), Algorithm 1, with a constant β.
    """

    lookahead: float = 0.3
    decay: float = 0.99
    start: int = 1
    where: Rule | None = None

    blend = 0.0

    def __post_init__(self) -> None:
        settle(self)
        checks.non_negative("EMANesterov", lookahead=self.lookahead)
        checks.fraction("EMANesterov", decay=self.decay)
        checks.positive("EMANesterov", decay=self.decay)
        self._check()

    @property
    def lead(self) -> float:  # type: ignore[override]
        return self.lookahead * (1 - self.decay) / self.decay

    def share(self, seen: int) -> float:
        return 1 - self.decay if seen else 1.0
