r"""Block Lanczos with full reorthogonalization and thick restarts.

A V_j = V_j T_j + Q_{j+1} B E_jᵀ with V_jᵀV_j = I and T_j = V_jᵀ A V_j, so that a Ritz pair (θ, V_j s) of T_j s = θ s has the
residual ‖A V_j s − θ V_j s‖ = ‖B E_jᵀ s‖, and A has an eigenvalue within it of θ. Both ends of the spectrum converge first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from precond.curvature.errors import NotSymmetric

# A map whose coefficients differ this much, relative to its norm, when both sides of the diagonal are computed is no rounding.
_ASYMMETRY = 1e-3


@dataclass(frozen=True)
class Ritz:
    """Approximate eigenvalues in ascending order.

    Attributes:
        values: θ, (j,).
        residuals: ‖A x − θ x‖, (j,).
        coordinates: s as columns, (j, j).
    """

    values: Tensor
    residuals: Tensor
    coordinates: Tensor

    @property
    def errors(self) -> Tensor:
        r"""Bounds of |θ − λ|: the residual ρ, or 2ρ²/γ where the neighbors are a distance γ > 2ρ away (Kato–Temple).

        γ is read from the Ritz values, which overstate the distance of neighbors that have not converged: the second form supposes that
        the next eigenvalue is at least half as far. That is no proof (of two eigenvalues closer together than ρ one may be hidden). The
        residual holds always: some eigenvalue lies within it.
        """
        theta, rho = self.values, self.residuals
        if len(theta) < 2:
            return rho
        step = theta.diff()
        gap = torch.full_like(theta, torch.inf)
        gap[:-1] = step - rho[1:]
        gap[1:] = torch.minimum(gap[1:], step - rho[:-1])
        return torch.where(gap > 2 * rho, 2 * rho.square() / gap, rho)


class Lanczos:
    """The recurrence, one block at a time.

    Args:
        apply: rows (k, n) to rows: A on each of k vectors.
        start: first block, (b, n), linearly independent rows.
        room: dimension of the space: at most this many steps make sense (n less what is deflated).
        basis: largest number of basis vectors in memory; beyond, both ends are kept and the rest is dropped.
        generator: source of directions where the Krylov space ends early.
        inside: projection onto the space, for those directions.
    """

    def __init__(
        self,
        apply: Callable[[Tensor], Tensor],
        start: Tensor,
        room: int,
        basis: int,
        generator: torch.Generator,
        inside: Callable[[Tensor], Tensor],
    ):
        self._apply, self.room, self.basis = apply, room, basis
        self._generator, self._inside = generator, inside
        self._V = start.new_empty(min(basis, 32) + len(start), start.shape[1])
        self._T = torch.zeros(64, 64, dtype=torch.float64)
        self.size = self._next = self.products = 0
        self.noise = 0.0
        self._fresh = True
        self._append(start)

    @property
    def exhausted(self) -> bool:
        """Whether the basis spans the whole space, so that T has all eigenvalues."""
        return self._next == self.size

    def step(self) -> None:
        """One more block: w = A q, T's next columns, and the next block from what is left of w."""
        j, m = self.size, self._next
        q = self._V[j:m]
        w = self._apply(q)
        self.products += len(q)
        C = torch.zeros(m, len(q), dtype=torch.float64)
        recent = max(0, 2 * j - m)
        # What the recurrence says is not zero goes first; what the full pass then finds is rounding, or asymmetry.
        w, C[recent:] = self._without(w, recent, m)
        before = torch.linalg.vector_norm(w, dim=1)
        w, again = self._without(w, 0, m)
        if not self._fresh and recent:
            self.noise = max(self.noise, float(torch.linalg.vector_norm(again[:recent], dim=0).max()))
        C += again
        # Twice is enough (Parlett): again where the pass took away most of w.
        if bool((torch.linalg.vector_norm(w, dim=1) < 0.7 * before).any()):
            w, again = self._without(w, 0, m)
            C += again
        if j > 0 and not self._fresh:
            self.noise = max(self.noise, float((C[recent:j] - self._T[recent:j, j:m]).abs().max()))
        self._grow(m + len(q))
        self._T[:m, j:m], self._T[j:m, :m] = C, C.T
        self._T[j:m, j:m] = (C[j:] + C[j:].T) / 2
        self.size, self._fresh = m, False
        norm = float(self._T[:m, :m].abs().max())
        if self.noise > _ASYMMETRY * norm:
            raise NotSymmetric(
                f"the map is not symmetric: coefficients vᵀAq and qᵀAv differ by {self.noise:.1e} at a norm of {norm:.1e}; "
                "give P.T @ H @ P instead of M @ H, and check that the objective is deterministic"
            )
        self._append(w, norm)

    def ritz(self) -> Ritz:
        """Ritz values with their residuals."""
        j = self.size
        theta, S = torch.linalg.eigh(self._T[:j, :j])
        B = self._T[j : self._next, :j]
        return Ritz(theta, torch.linalg.vector_norm(B @ S, dim=0), S)

    def vectors(self, coordinates: Tensor) -> Tensor:
        """V_j s for columns s, as rows."""
        V = self._V[: self.size]
        return coordinates.T.to(V) @ V

    def restart(self, keep: Tensor) -> None:
        """Shrink the basis to the Ritz vectors at the positions ``keep``; T becomes their θ, bordered by their residuals."""
        ritz = self.ritz()
        theta, S, j, k = ritz.values[keep], ritz.coordinates[:, keep], self.size, len(keep)
        border = self._T[j : self._next, :j] @ S
        self._V[:k], pending = self.vectors(S), self._V[j : self._next].clone()
        self._V[k : k + len(pending)] = pending
        self._T.zero_()
        self._T[:k, :k] = theta.diag()
        self.size, self._next = k, k + len(pending)
        self._T[k : self._next, :k], self._T[:k, k : self._next] = border, border.T
        self._fresh = True

    def _without(self, w: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
        """w less its components along V[first:last], and these."""
        V = self._V[first:last]
        if len(w) == 1:
            c = V @ w[0]
            return torch.addmv(w[0], V.T, c, alpha=-1)[None], c[:, None].double().cpu()
        C = V @ w.T
        return torch.addmm(w, C.T, V, alpha=-1), C.double().cpu()

    def _append(self, w: Tensor, norm: float = 0.0) -> None:
        """Put an orthonormal basis of a block's rows next, W = RᵀQ; directions that vanish are replaced at random."""
        j, b = self.size, min(len(w), self.room - self.size)
        if b <= 0:
            self._next = j
            return
        if len(w) == 1:
            s, Q, R = torch.linalg.vector_norm(w, dim=1), w, torch.ones(1, 1, dtype=torch.float64)
            Q = w / s.clamp_min(torch.finfo(w.dtype).tiny)
        else:
            U, s, R = torch.linalg.svd(w.T, full_matrices=False)
            Q, R = U.T, R.double().cpu()
        s, R = s[:b].double().cpu(), R[:b]
        self._V[j : j + b] = Q[:b]
        self._next = j + b
        gone = torch.nonzero(s <= 10 * torch.finfo(w.dtype).eps * norm)[:, 0].tolist()
        s[gone] = 0
        for i in gone:
            self._V[j + i] = self._random(j + i)
        if j > 0:
            # A q_i = … + Σ_l s_l R[l, i] q_{j+l}: what T gets below its last block.
            self._T[j : j + b, j - len(w) : j] = s[:, None] * R
            self._T[j - len(w) : j, j : j + b] = (s[:, None] * R).T

    def _random(self, last: int) -> Tensor:
        """A unit vector orthogonal to V[:last]."""
        V = self._V[:last]
        x = torch.randn(1, V.shape[1], generator=self._generator, dtype=torch.float64).to(V)
        for _ in range(3):
            x = self._inside(x)
            x = x - (x @ V.T) @ V
            x = x / torch.linalg.vector_norm(x)
        return x[0]

    def _grow(self, needed: int) -> None:
        if needed > len(self._V):
            larger = self._V.new_empty(max(needed, min(2 * len(self._V), self.basis)), self._V.shape[1])
            larger[: self._next] = self._V[: self._next]
            self._V = larger
        if needed > len(self._T):
            square = torch.zeros(2 * needed, 2 * needed, dtype=torch.float64)
            square[: len(self._T), : len(self._T)] = self._T
            self._T = square
