"""Prediction and observation side by side."""

from __future__ import annotations

import math
from dataclasses import dataclass

from precond.analysis.convergence.numbers import decimals
from precond.analysis.convergence.observation import ObservedRate
from precond.analysis.convergence.prediction import Prediction


@dataclass(frozen=True)
class Comparison:
    """What a spectrum predicts and what a trace shows, side by side.

    Attributes:
        predicted: from the spectrum.
        observed: from the trace.

    Example:
        >>> import precond
        >>> predicted = precond.predict((1.0, 3.0))  # r = 1/2
        >>> comparison = Comparison(predicted, precond.observed_rate([0.25**t for t in range(20)], minimum=0.0))
        >>> comparison.agrees, round(comparison.ratio, 3)
        (True, 1.0)
    """

    predicted: Prediction
    observed: ObservedRate

    @property
    def ratio(self) -> float:
        """Steps observed over steps predicted, to any tolerance."""
        return self.predicted.decay / self.observed.decay if self.observed.decay else math.inf

    @property
    def agrees(self) -> bool:
        """Whether the two decays differ by at most twice the sum of their errors, or by 1 % (first-order theory holds no further)."""
        error = self.observed.decay_error + self.predicted.error / max(self.predicted.rate, 1e-300)
        return abs(self.predicted.decay - self.observed.decay) <= max(2 * error, 0.01 * abs(self.predicted.decay))

    def __str__(self) -> str:
        p, o = self.predicted, self.observed
        rows = [
            ("", "predicted", "observed"),
            ("rate per step", decimals(p.rate, p.error), f"{decimals(o.rate, o.error)}"),
            ("steps to 1e-3", f"{p.steps(1e-3):.4g}", f"{o.steps(1e-3):.4g}"),
            ("steps to 1e-6", f"{p.steps(1e-6):.4g}", f"{o.steps(1e-6):.4g}"),
        ]
        lines = [f"{a:<14} {b:<24} {c}" for a, b, c in rows]
        verdict = "agree" if self.agrees else f"differ: {self.ratio:.3g} times as many steps as predicted"
        return "\n".join([*lines, f"{verdict}; {o}"])
