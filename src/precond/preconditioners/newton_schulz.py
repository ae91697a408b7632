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


def symmetric_product(A: Tensor, B: Tensor, out: Tensor) -> Tensor:
    """out ← A B for matrices whose product is symmetric: the block below the diagonal is copied, not computed."""
    n = out.shape[0]
    if n < 256 or n % 2:
        return torch.mm(A, B, out=out)
    h = n // 2
    torch.mm(A[:h], B, out=out[:h])
    torch.mm(A[h:], B[:, h:], out=out[h:, h:])
    out[h:, :h].copy_(out[:h, h:].T)
    return out


@dataclass(frozen=True)
class Iteration:
    """The iteration in place, in the dtype of X: by turns of at most three steps in Gram form, or plainly where X is square.

    In 16-bit arithmetic a Gram matrix has small negative eigenvalues, which the iteration amplifies; it is formed anew from X before
    they matter, after three steps.
    """

    coefficients: Coefficients
    steps: int

    def __call__(self, X: Tensor, take: Callable[..., list[Tensor]]) -> tuple[Tensor, Tensor]:
        """(the last iterate, the first Gram matrix of the smaller side) for X (m, n) with ‖X‖ ≤ 1; ``take`` gives scratch."""
        wide = X.shape[0] <= X.shape[1]
        s, longer = sorted(X.shape)
        Y, first, A, B, q, Q, Z = take(X.shape, *[(s, s)] * 6)
        # What a turn saves are products with X; where X is about square, those of the Gram form cost as much.
        turn = 3 if longer >= 1.5 * s else 1
        for start in range(0, self.steps, turn):
            G = first if start == 0 else A
            symmetric_product(*((X, X.T) if wide else (X.T, X)), out=G)
            Q.copy_(self._factor(G, q))
            for _ in range(start + 1, min(start + turn, self.steps)):
                torch.mm(G, q, out=Z)
                G = A if G is not A else B
                symmetric_product(Z, q, out=G)
                symmetric_product(Q, self._factor(G, q), out=Z)
                Q, Z = Z, Q
            torch.mm(*((Q, X) if wide else (X, Q)), out=Y)
            X, Y = Y, X
        return X, first

    def _factor(self, G: Tensor, out: Tensor) -> Tensor:
        """out ← aI + bG + cG²."""
        a, b, c = self.coefficients
        symmetric_product(G, G, out).mul_(c).add_(G, alpha=b).diagonal().add_(a)
        return out
