r"""c of the means of gradients that optimizers take: α·λ_max(PᵀHP) < 2c is the limit of steady steps on a quadratic, P standing still.

A mean d = G(g) of the gradients so far is linear, and beyond the limit p alternates in sign from step to step: of gradients (−1)ᵗ a mean is
G(−1)(−1)ᵗ, and p changes by −2p where α·G(−1)·λ = 2. So c = 1/G(−1): 1 of the gradient itself, and of m ← βm + (1−β)g, (1 + β)/(1 − β).

References:
    Cohen et al. (2021), appendix B, for heavy ball and Nesterov's momentum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

Options = Mapping[str, Any]
Stable = Callable[[Options, Options], float]
"""(state of a parameter, its group) ↦ c."""


def gradient(state: Options, group: Options) -> float:
    """The gradient itself."""
    return 1.0


def heavy_ball(beta: float, dampening: float = 0.0, nesterov: bool = False) -> float:
    """m ← βm + (1−τ)g, or (1−τ)g + βm of that."""
    if not beta:
        return 1.0
    return (1 + beta) / ((1 + 2 * beta if nesterov else 1) * (1 - dampening)) if dampening < 1 else math.inf


def mean(beta: float, nesterov: bool = False) -> float:
    """m ← βm + (1−β)g, or (1−β)g + βm of that."""
    return heavy_ball(beta, beta, nesterov)


def first_beta(state: Options, group: Options) -> float:
    """Adam's mean."""
    return mean(float(group["betas"][0]))


def unless(stable: Stable, *options: str) -> Stable:
    """The same, but NaN where one of some options is on, which make of the mean what is not known."""
    return lambda state, group: math.nan if any(group.get(option) for option in options) else stable(state, group)


def nadam(state: Options, group: Options) -> float:
    """(1−μ)g + μ⁺m of Adam's mean m, μ = β₁(1 − ½·0.96^(tψ)), which grows from β₁/2 to β₁ in thousands of steps: as it is."""
    beta, t = float(group["betas"][0]), max(float(state.get("step", 0)), 1.0)
    mu, ahead = (beta * (1 - 0.5 * 0.96 ** (s * group["momentum_decay"])) for s in (t, t + 1))
    return 1 / (1 - mu + ahead / mean(beta))


def newest_share(steps: float, group: Options) -> float:
    """Of the newest iterate in a schedule-free optimizer's average, by the weights of its group."""
    return steps ** group["r"] * group["lr_max"] ** group["weight_lr_power"] / group["weight_sum"]


def schedule_free(beta: float, share: float) -> float:
    """y = (1−β)z + βx of steps of z at y and their average x, in which the newest z has a share: 1/(1−β) in the end."""
    return (2 - share) / (2 * (1 - beta) + (2 * beta - 1) * share)
