r"""Block Lanczos with full reorthogonalization and thick restarts.

A V_j = V_j T_j + Q_{j+1} B E_jᵀ with V_jᵀV_j = I and T_j = V_jᵀ A V_j, so that a Ritz pair (θ, V_j s) of T_j s = θ s has the
residual ‖A V_j s − θ V_j s‖ = ‖B E_jᵀ s‖, and A has an eigenvalue within it of θ. Both ends of the spectrum converge first.

Of a multiple eigenvalue the Krylov space of one vector holds one direction. The others are orthogonal to it: a chain from a fresh random
vector, orthogonal to all that is there, finds them. T has the products of both; what is left of the first chain's end is part of the
residuals.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from precond.analysis.curvature.errors import NotSymmetric

# A map whose coefficients differ this much, relative to its norm, when both sides of the diagonal are computed is no rounding.
_ASYMMETRY = 1e-3


_SYMMETRIC = (
    "give P.T @ H @ P instead of M @ H, check that the objective is deterministic, and compute 16-bit models in float64 "
    "(hessian(objective.double()))"
)


def asymmetry_allowed(dtype: torch.dtype) -> float:
    """What asymmetry may be rounding of products in a dtype: in 16 bits, that of the 16 operations that a derivative passes, say."""
    return max(_ASYMMETRY, 16 * torch.finfo(dtype).eps if torch.finfo(dtype).bits < 32 else 0.0)


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

        Values much closer together than their residuals, copies of one, are taken as a group, with γ the distance of the group's
        neighbors and ρ² the sum of the group's (Mathias). γ is read from the Ritz values, which overstate the distance of neighbors that
        have not converged: the second form supposes that the next eigenvalue is at least half as far. That is no proof (of two eigenvalues
        closer together than ρ one may be hidden). The residual holds always: some eigenvalue lies within it.

        References:
            Mathias (1998), Quadratic residual bounds for the Hermitian eigenvalue problem.
        """
        theta, rho = self.values, self.residuals
        if len(theta) < 2:
            return rho
        step = theta.diff()
        apart = step > 3 * torch.maximum(rho[1:], rho[:-1])
        group = torch.cat([torch.zeros(1, dtype=torch.long), apart.cumsum(0)])
        square = torch.zeros_like(theta).index_add(0, group, rho.square())
        gap = torch.full_like(theta, torch.inf)
        gap[group[:-1][apart]] = (step - rho[1:])[apart]
        gap[group[1:][apart]] = torch.minimum(gap[group[1:][apart]], (step - rho[:-1])[apart])
        width = torch.zeros_like(theta).index_add(0, group[1:], torch.where(apart, 0.0, step))
        tight = (width <= 0.1 * square.sqrt()) & (gap > 2 * square.sqrt()) & gap.isfinite()
        return torch.where(tight[group], torch.minimum(2 * (square / gap)[group], rho), rho)


class Lanczos:
    """The recurrence, one block at a time.

    Args:
        apply: rows (k, n) to rows: A on each of k vectors.
        start: first block, (b, n), linearly independent rows.
        room: dimension of the space: at most this many steps make sense (n less what is deflated).
        basis: largest number of basis vectors in memory; beyond, both ends are kept and the rest is dropped.
        generator: source of directions where the Krylov space ends early.
        inside: projection onto the space, for those directions.
        asymmetry: of the map, relative to its norm, from where on it is refused.
    """

    def __init__(
        self,
        apply: Callable[[Tensor], Tensor],
        start: Tensor,
        room: int,
        basis: int,
        generator: torch.Generator,
        inside: Callable[[Tensor], Tensor],
        asymmetry: float = _ASYMMETRY,
    ):
        self._apply, self.room, self.basis, self._asymmetry = apply, room, basis, asymmetry
        self._generator, self._inside = generator, inside
        self._V = start.new_empty(min(basis, 32) + len(start), start.shape[1])
        self._T = torch.zeros(64, 64, dtype=torch.float64)
        # Where chains before this one ended: directions u outside of the basis, and coefficients c, A V = V T + Σ u cᵀ + ….
        self._loose, self._slack = start[:0], torch.zeros(0, 64, dtype=torch.float64)
        # The basis is V[:size], the next block V[size:next], the block before it V[before:size].
        self.size = self._next = self._before = self.products = self.length = 0
        self._chain: int | None = 0
        self.noise = 0.0
        self._fresh = True
        self._append(start)

    @property
    def exhausted(self) -> bool:
        """Whether the basis spans the whole space, so that T has all eigenvalues."""
        return self._next == self.size

    def fresh(self, block: int) -> None:
        """Go on from random vectors orthogonal to the basis, not from where the chain has come to."""
        j, m = self.size, self._next
        border = self._T[j:m].clone()
        ended = border.abs().sum(1) > 0
        self._loose = torch.cat([self._loose, self._V[j:m][ended.to(self._V.device)]])
        self._slack = torch.cat([self._slack, border[ended]])
        self._T[j:], self._T[:, j:] = 0, 0
        self._next = j + min(block, self.room - j)
        self._grow(self._next)
        for i in range(j, self._next):
            self._V[i] = self._random(i)
        self._before = self._chain = j
        self.length, self._fresh = 0, True

    def step(self) -> None:
        """One more block: w = A q, T's next columns, and the next block from what is left of w."""
        j, m = self.size, self._next
        q = self._V[j:m]
        w = self._apply(q)
        self.products += len(q)
        C = torch.zeros(m, len(q), dtype=torch.float64)
        recent = self._before
        # What the recurrence says is not zero goes first; what the full pass then finds is rounding, or asymmetry.
        w, C[recent:] = self._without(w, self._V[recent:m])
        before = torch.linalg.vector_norm(w, dim=1)
        w, again = self._without(w, self._V[:m])
        known = self._chain or 0
        if not self._fresh and recent > known:
            self.noise = max(self.noise, float(torch.linalg.vector_norm(again[known:recent], dim=0).max()))
        C += again
        # Twice is enough (Parlett): again where the pass took away most of w.
        if bool((torch.linalg.vector_norm(w, dim=1) < 0.7 * before).any()):
            w, again = self._without(w, self._V[:m])
            C += again
        if j > 0 and not self._fresh:
            self.noise = max(self.noise, float((C[recent:j] - self._T[recent:j, j:m]).abs().max()))
        self._grow(m + len(q))
        self._T[:m, j:m], self._T[j:m, :m] = C, C.T
        self._T[j:m, j:m] = (C[j:] + C[j:].T) / 2
        self._loose = self._loose - (self._loose @ q.T) @ q
        self.size, self._before, self._fresh = m, j, False
        self.length += 1
        norm = float(self._T[:m, :m].abs().max())
        if self.noise > self._asymmetry * norm:
            raise NotSymmetric(
                f"the map is not symmetric: coefficients vᵀAq and qᵀAv differ by {self.noise:.1e} at a norm of {norm:.1e}; "
                f"{_SYMMETRIC}"
            )
        self._append(w, norm)

    def ritz(self) -> Ritz:
        """Ritz values with their residuals."""
        j = self.size
        theta, S = torch.linalg.eigh(self._T[:j, :j])
        outside = self._T[j : self._next, :j] @ S
        if not len(self._loose):
            return Ritz(theta, torch.linalg.vector_norm(outside, dim=0), S)
        outside = torch.cat([outside, self._slack[:, :j] @ S])
        directions = torch.cat([self._V[j : self._next], self._loose])
        gram = (directions @ directions.T).double().cpu()
        return Ritz(theta, (outside * (gram @ outside)).sum(0).clamp_min(0).sqrt(), S)

    def chain(self) -> Ritz | None:
        """Ritz values of A restricted to what was orthogonal to the basis at the last fresh start; None after a restart."""
        if self._chain is None:
            return None
        c, j = self._chain, self.size
        theta, S = torch.linalg.eigh(self._T[c:j, c:j])
        return Ritz(theta, torch.linalg.vector_norm(self._T[j : self._next, c:j] @ S, dim=0), S)

    def recurrence(self) -> Tensor:
        """α_j and β_j, A q_j = β_{j−1} q_{j−1} + α_j q_j + β_j q_{j+1}, of a run from one vector, (j, 2)."""
        j = self.size
        T = torch.zeros(j + 1, j + 1, dtype=torch.float64)
        T[: self._next, : self._next] = self._T[: self._next, : self._next]
        return torch.stack([T.diagonal()[:j], T.diagonal(-1)], 1)

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
        slack = self._slack[:, :j] @ S
        self._T.zero_()
        self._slack.zero_()
        self._slack[:, :k] = slack
        self._T[:k, :k] = theta.diag()
        self.size, self._next, self._before = k, k + len(pending), k
        self._T[k : self._next, :k], self._T[:k, k : self._next] = border, border.T
        self._fresh, self._chain = True, None

    @staticmethod
    def _without(w: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
        """w less its components along the rows of V, and these."""
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
        gone = s <= 10 * torch.finfo(w.dtype).eps * norm
        s[gone] = 0
        for i in range(b):
            if gone[i]:
                self._V[j + i] = self._random(j + i)
            elif s[i] < 0.01 * s[0]:
                # A small part of the block is as far from orthogonal to the basis as rounding of the large part makes it.
                self._V[j + i] = self._orthogonal(self._V[j + i][None], j + i)
        if j > 0:
            # A q_i = … + Σ_l s_l R[l, i] q_{j+l}: what T gets below its last block.
            self._T[j : j + b, j - len(w) : j] = s[:, None] * R
            self._T[j - len(w) : j, j : j + b] = (s[:, None] * R).T

    def _random(self, last: int) -> Tensor:
        """A random unit vector orthogonal to V[:last]."""
        return self._orthogonal(
            torch.randn(1, self._V.shape[1], generator=self._generator, dtype=torch.float64).to(self._V), last
        )

    def _orthogonal(self, x: Tensor, last: int) -> Tensor:
        V = self._V[:last]
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
            wide = torch.zeros(len(self._slack), 2 * needed, dtype=torch.float64)
            wide[:, : self._slack.shape[1]] = self._slack
            self._slack = wide
