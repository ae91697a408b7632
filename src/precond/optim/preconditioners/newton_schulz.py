r"""Newton–Schulz iteration: X ← X·q(XᵀX) with q(A) = aI + bA + cA², which drives all singular values towards 1.

With G = XXᵀ of the smaller side, every iterate is a polynomial in G times X: q₅(A₅)⋯q₁(A₁)X with Aₖ₊₁ = Aₖ qₖ(Aₖ)². In this
*Gram form* the iterations multiply small square matrices only.

References:
    Jordan et al. (2024), Muon; Kovarik (1970), Björck & Bowie (1971) for the iteration.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from precond.optim.preconditioners.kronecker import fold
from precond.optim.preconditioners.workspace import WORKSPACE

Coefficients = tuple[float, float, float]
JORDAN: Coefficients = (3.4445, -4.7750, 2.0315)
"""Steepest at zero: singular values above 10⁻³ of the norm end between 0.68 and 1.2 after five steps."""


def stays_bounded(coefficients: Coefficients, steps: int) -> bool:
    """Whether singular values of at most one stay below ten: other coefficients end in inf, in a few steps or in many."""
    a, b, c = coefficients
    for start in range(1, 101):
        x = start / 100
        for _ in range(steps):
            x = x * (a + b * x * x + c * x**4)
            if not abs(x) < 10:
                return False
    return True


def polynomial(G: Tensor, coefficients: Coefficients, steps: int) -> Tensor:
    """Q(G) such that the iteration maps X to Q(XXᵀ)X, from G = XXᵀ (n, n) with eigenvalues in [0, 1]."""
    a, b, c = coefficients
    eye = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
    Q, A = eye, G
    for k in range(steps):
        q = a * eye + b * A + c * (A @ A)
        Q = q @ Q
        if k + 1 < steps:
            A = A @ q @ q
    return Q


def iterated(X: Tensor, coefficients: Coefficients, steps: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """(scale times the last iterate, the first Gram matrix of the smaller side) from X (k, A, B), ‖X‖ ≤ 1 each."""
    if len(X) == 1 and X.device.type == "cpu":  # in memory that is there already, with fewer operations
        last, gram = Iteration(coefficients, steps)(X[0], lambda *shapes: WORKSPACE.take(X.dtype, *shapes))
        return (scale * last)[None], gram[None]
    a, b, c = coefficients
    wide, Y = X.shape[-2] <= X.shape[-1], torch.empty_like(X)
    first = A = X @ X.mT if wide else X.mT @ X
    for k in range(steps):
        gain = scale if k == steps - 1 else 1.0
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)  # q(A) = aI + B
        torch.baddbmm(X, *((B, X) if wide else (X, B)), beta=gain * a, alpha=gain, out=Y)
        X, Y = Y, X
        if k < steps - 1:
            A = X @ X.mT if wide else X.mT @ X
    return X, first


@dataclass(frozen=True)
class Iteration:
    """The iteration in place, in the dtype of X: a few steps on one Gram matrix, or one where X is about square.

    A Gram matrix rounded to 16 bits has small negative eigenvalues, which grow from step to step, and q with them. The first one,
    of a matrix whose squares sum to one, is small enough to bear three steps, later ones bear two; then comes one of X anew.
    Multiples of a are added within a product, before it is rounded: on the diagonal of a 16-bit matrix they would round by more
    than the rest weighs. R alone has them on its diagonal: left out there, they would cancel against all the rest at the end.
    """

    coefficients: Coefficients
    steps: int

    def __call__(self, X: Tensor, take: Callable[..., list[Tensor]], scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """(the last iterate, the first Gram matrix of the smaller side) from scale·X (m, n), ‖scale·X‖ ≤ 1; ``take`` gives scratch."""
        a, b, c = self.coefficients
        wide = X.shape[0] <= X.shape[1]
        s, longer = sorted(X.shape)
        Y, A, G, B, R, T, U = take(X.shape, *[(s, s)] * 6)
        first = A
        for run in self._runs(longer / s):
            fold(A, X, not wide, 0.0, scale * scale)
            torch.addmm(A, A, A, beta=b, alpha=c, out=B)  # q(A) = aI + B
            if run == 1:
                torch.addmm(X, *((B, X) if wide else (X, B)), beta=a * scale, alpha=scale, out=Y)
            else:
                R.copy_(B).diagonal().add_(a)
                for _ in range(run - 1):
                    torch.addmm(A, A, B, beta=a, out=T)
                    A = torch.addmm(T, T, B, beta=a, out=G)  # A q(A)²
                    torch.addmm(A, A, A, beta=b, alpha=c, out=B)
                    R, U = torch.addmm(R, B, R, beta=a, out=U), R
                torch.addmm(Y, *((R, X) if wide else (X, R)), beta=0, alpha=scale, out=Y)
            X, Y, A, scale = Y, X, G, 1.0
        return X, first

    def _runs(self, aspect: float) -> list[int]:
        """How many steps are taken on each Gram matrix."""
        # k steps on one save 2(k−1)s²·longer operations with X and cost 3(k−1)s³ more.
        if aspect < 1.5:
            return [1] * self.steps
        runs, left = [min(3, self.steps)], self.steps - 3
        return runs + [min(2, left - k) for k in range(0, left, 2)]
