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

Coefficients = tuple[float, float, float]
JORDAN: Coefficients = (3.4445, -4.7750, 2.0315)
"""Steepest at zero: singular values above 10⁻³ of the norm end between 0.68 and 1.2 after five steps."""


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


@dataclass(frozen=True)
class Iteration:
    """The iteration in place, in the dtype of X: two steps at a time in Gram form, or plainly where X is about square.

    A Gram matrix rounded to 16 bits has small negative eigenvalues, and a product of many factors q weighs weak directions a hundred
    times more than strong ones: three steps on one Gram matrix already spoil uneven spectra in bfloat16. Two do not; the next
    pair starts from X anew.
    """

    coefficients: Coefficients
    steps: int

    def __call__(self, X: Tensor, take: Callable[..., list[Tensor]]) -> tuple[Tensor, Tensor]:
        """(the last iterate, the first Gram matrix of the smaller side) for X (m, n) with ‖X‖ ≤ 1; ``take`` gives scratch."""
        wide = X.shape[0] <= X.shape[1]
        s, longer = sorted(X.shape)
        Y, first, G, q, q2, Q = take(X.shape, *[(s, s)] * 5)
        # A pair saves two products with X, of 2s²·longer operations together, and costs 6s³ more.
        pair = 2 if longer >= 1.5 * s else 1
        for start in range(0, self.steps, pair):
            A = first if start == 0 else G
            torch.mm(*((X, X.T) if wide else (X.T, X)), out=A)
            R = self._factor(A, q)
            if start + 1 < min(start + pair, self.steps):
                torch.mm(A, q, out=Q)
                torch.mm(Q, q, out=G)
                R = torch.mm(q, self._factor(G, q2), out=Q)
            torch.mm(*((R, X) if wide else (X, R)), out=Y)
            X, Y = Y, X
        return X, first

    def _factor(self, G: Tensor, out: Tensor) -> Tensor:
        """out ← aI + bG + cG²."""
        a, b, c = self.coefficients
        torch.mm(G, G, out=out).mul_(c).add_(G, alpha=b).diagonal().add_(a)
        return out
