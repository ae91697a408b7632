"""A rule for the sign of a gain that learns from cells of other data, and abstains where it is not certain."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

CERTAIN = 0.8
"""The rule speaks where its probability of one of both signs is at least this."""

_RIDGE = 1.0  # of the coefficients but the constant: LogisticRegression's own default in scikit-learn


def probabilities(features: Sequence[Sequence[float]], gained: Sequence[bool], groups: Sequence[str]) -> list[float]:
    """Of a gain in each cell, by a logistic regression on the cells of all other groups; 1/2 where there are none.

    Features are in units of their standard deviations in these, so that the ridge takes all alike.

    Args:
        features: of each cell, known before training.
        gained: whether there was a gain.
        groups: the data of each cell; a cell is never judged by what was measured on its own.
    """
    X = torch.tensor([tuple(row) for row in features], dtype=torch.float64)
    y = torch.tensor([float(g) for g in gained], dtype=torch.float64)
    found = [math.nan] * len(groups)
    for group in set(groups):
        own = torch.tensor([g == group for g in groups])
        if own.all():
            found = [0.5 if g == group else p for g, p in zip(groups, found, strict=True)]
            continue
        std, mean = torch.std_mean(X[~own], 0, correction=0)
        Z = torch.cat([torch.ones_like(y)[:, None], (X - mean) / std.clamp_min(1e-9)], 1)
        w = _fitted(Z[~own], y[~own])
        for i in own.nonzero().flatten().tolist():
            found[i] = float(torch.sigmoid(Z[i] @ w))
    return found


def _fitted(X: Tensor, y: Tensor) -> Tensor:
    """The w with the least Σ log(1 + exp(∓Xw)) + ridge·‖w‖²/2, by Newton's method."""
    w, ridge = X.new_zeros(X.shape[1]), X.new_full((X.shape[1],), _RIDGE)
    ridge[0] = 1e-6  # of the constant, which then exists also where all gained
    for _ in range(30):
        p = torch.sigmoid(X @ w)
        w = w - torch.linalg.solve((X.mT * (p * (1 - p))) @ X + ridge.diag(), X.mT @ (p - y) + ridge * w)
    return w
