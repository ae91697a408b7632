"""Matrix preconditioners as explicit n × n matrices in float64; no line of the library. Entries are ordered row-major."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from oracle import Preconditioner, damped, root


def power(S: Tensor, e: float, floor: float = 0.0) -> Tensor:
    """S^e of a symmetric matrix, eigenvalues below ``floor`` times the largest raised to it."""
    s, V = torch.linalg.eigh(S)
    return V @ torch.diag(torch.maximum(s, floor * s.max()) ** e) @ V.T


class Matrix(Preconditioner):
    """P of one weight (rows, columns), from its gradients; what subclasses say of M or P."""

    turn = 0  # the second of several shapes is due a step before the first

    diagonal = False
    advised = 0.1

    def __init__(self, rows: int, columns: int):
        self.rows, self.columns, self.seen = rows, columns, []

    def see(self, g: Tensor) -> None:
        self.seen.append(g.reshape(self.rows, self.columns))

    def M(self) -> Tensor:
        raise NotImplementedError

    def P(self) -> Tensor:
        return root(self.M(), 0.5)

    def damped(self, delta: float | None) -> Tensor:
        return damped(self.P(), self.advised if delta is None else delta, [torch.arange(self.rows * self.columns)])


class Shampoo(Matrix):
    """M = (L + ε λ I)^(−e) ⊗ (R + ε λ I)^(−e) from the statistics at the last step that renews roots."""

    def __init__(self, rows, columns, e=0.25, decay=None, initial=0.0, damping=1e-6, every=1, sides="both"):
        super().__init__(rows, columns)
        self.e, self.decay, self.initial, self.eps, self.every, self.sides = e, decay, initial, damping, every, sides

    def M(self) -> Tensor:
        t = len(self.seen)
        t = max(t - (t + self.turn) % self.every, 1)
        return torch.kron(self._side(t, left=True), self._side(t, left=False))

    def _side(self, t: int, left: bool) -> Tensor:
        n = self.rows if left else self.columns
        if self.sides == ("right" if left else "left"):
            return torch.eye(n, dtype=torch.float64)
        S = torch.zeros(n, n, dtype=torch.float64)
        for k, G in enumerate(self.seen[:t]):
            weight = 1.0 if self.decay is None else (1 - self.decay) * self.decay ** (t - 1 - k) / (1 - self.decay**t)
            S += weight * (G @ G.T if left else G.T @ G)
        S += self.initial * torch.eye(n, dtype=torch.float64)
        return power(S + self.eps * torch.linalg.eigvalsh(S).max() * torch.eye(n, dtype=torch.float64), -self.e)


class OutputFactor(Matrix):
    """M = (B/β + ε λ I)^(−e) on the rows of a weight and on its bias, whose entries follow the weight's."""

    advised = 0.0

    def __init__(self, rows, columns, e=1.0, decay=0.95, damping=0.01, every=10):
        super().__init__(rows, columns)
        self.e, self.decay, self.eps, self.every = e, decay, damping, every

    def see(self, g: Tensor) -> None:
        weight, bias = g.split([self.rows * self.columns, self.rows])
        self.seen.append(torch.cat([weight.view(self.rows, self.columns), bias[:, None]], 1))

    def M(self) -> Tensor:
        t = len(self.seen)
        t = max(t - (t + self.turn) % self.every, 1)
        B = sum(self.decay ** (t - 1 - k) * G @ G.T for k, G in enumerate(self.seen[:t]))
        B = B / torch.linalg.eigvalsh(B).mean()
        R = power(B + self.eps * torch.linalg.eigvalsh(B).max() * torch.eye(self.rows, dtype=torch.float64), -self.e)
        return torch.block_diag(torch.kron(R, torch.eye(self.columns, dtype=torch.float64)), R)

    def damped(self, delta: float | None) -> Tensor:
        n = self.rows * (self.columns + 1)
        return damped(self.P(), self.advised if delta is None else delta, [torch.arange(n)])


class Grafted(Matrix):
    """s²M with s such that ‖s²M g‖ is ‖g‖."""

    def __init__(self, inner: Matrix):
        super().__init__(inner.rows, inner.columns)
        self.inner = inner

    def see(self, g: Tensor) -> None:
        super().see(g)
        self.inner.see(g)

    def M(self) -> Tensor:
        g = self.seen[-1].reshape(-1)
        return self.inner.M() * g.norm() / (self.inner.M() @ g).norm()


class SOAP(Matrix):
    """P = (Q_A ⊗ Q_B) diag((√r̂ + ε)^(−1/2)), all of it as loops over gradients and explicit Kronecker products."""

    def __init__(self, rows, columns, decay=0.95, eps=1e-8, every=10, sides=("left", "right"), rank=None):
        super().__init__(rows, columns)
        self.decay, self.eps, self.every, self.sides = decay, eps, every, sides
        self.few = {side: rank is not None and n > 4 * rank for side, n in (("left", rows), ("right", columns))}
        self.rank, self.leading = rank, dict[str, Tensor]()
        self.Q = {"left": torch.eye(rows, dtype=torch.float64), "right": torch.eye(columns, dtype=torch.float64)}
        self.S = {side: torch.zeros_like(Q) for side, Q in self.Q.items()}
        self.r = torch.zeros(rows * columns, dtype=torch.float64)

    @property
    def rotation(self) -> Tensor:
        return torch.kron(self.Q["left"].contiguous(), self.Q["right"].contiguous())

    def see(self, g: Tensor) -> None:
        t = len(self.seen)  # steps that are over
        if t == 1 or (t and (t + self.turn) % self.every == 0):
            self._refresh(first=t == 1)
        super().see(g)
        G = self.seen[-1]
        self.r = self.decay * self.r + (1 - self.decay) * (self.rotation.T @ g.reshape(-1)) ** 2
        for side, square in (("left", G @ G.T), ("right", G.T @ G)):
            self.S[side] = self.decay * self.S[side] + (1 - self.decay) * square
            if self.few[side]:
                self._lead(side)

    def _lead(self, side: str) -> None:
        """S becomes the part of it on the span of S V, V the eigenvectors before; at first S³ on fixed columns."""
        S, n = self.S[side], len(self.S[side])
        V = self.leading.get(side)
        if V is None:
            i = torch.arange(1, n * self.rank + 1, dtype=torch.float64)
            V = S @ S @ torch.sin(i**2).reshape(n, self.rank)
        Q = gram_schmidt(S @ V)
        values, W = torch.linalg.eigh(Q.T @ S @ Q)
        self.leading[side] = (Q @ W).flip(1)
        self.S[side] = (Q @ W * values) @ (Q @ W).T

    def _refresh(self, first: bool) -> None:
        before = self.rotation
        for side in self.sides:
            if self.few[side]:
                self.Q[side] = reflections(self.leading[side])
                continue
            if first:
                self.Q[side] = torch.linalg.eigh(self.S[side])[1].flip(1)
                continue
            sizes = torch.diag(self.Q[side].T @ self.S[side] @ self.Q[side])
            order = sorted(range(len(sizes)), key=lambda i: -float(sizes[i]))
            r = self.r.reshape(self.rows, self.columns)
            self.r = (r[order] if side == "left" else r[:, order]).reshape(-1)
            self.Q[side] = gram_schmidt(self.S[side] @ self.Q[side][:, order])
        if first:
            self.r = ((self.rotation.T @ before) ** 2) @ self.r

    def P(self) -> Tensor:
        h = (self.r / (1 - self.decay ** len(self.seen))).sqrt()
        if len(self.seen) == 1:  # bases are not chosen
            h = 0 * h + self.seen[0].norm()
        return self.rotation @ torch.diag((h + self.eps) ** -0.5)


def reflections(U: Tensor) -> Tensor:
    """The product of the Householder matrices, each of n × n, that take the columns of U to unit vectors one by one."""
    n, Q, A = len(U), torch.eye(len(U), dtype=U.dtype), U.clone()
    for k in range(U.shape[1]):
        v = A[:, k].clone()
        v[:k] = 0
        v[k] += v.norm() if v[k] >= 0 else -v.norm()
        H = torch.eye(n, dtype=U.dtype) - 2 * torch.outer(v, v) / (v @ v)
        Q, A = Q @ H, H @ A
    return Q


def gram_schmidt(Y: Tensor) -> Tensor:
    """Columns of Y made orthonormal one after the other, twice for rounding."""
    columns: list[Tensor] = []
    for y in Y.T:
        for _ in range(2):
            for q in columns:
                y = y - (q @ y) * q
        columns.append(y / y.norm())
    return torch.stack(columns, 1)


def quintic(sigma: Tensor, steps: int = 5, coefficients: Sequence[float] = (3.4445, -4.7750, 2.0315)) -> Tensor:
    """What Newton–Schulz makes of singular values."""
    a, b, c = coefficients
    for _ in range(steps):
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    return sigma


class Muon(Matrix):
    """M from the singular value decomposition of an average of gradients: M m = γ U f(Σ/‖m‖) Vᵀ."""

    advised = 0.0

    def __init__(
        self, rows, columns, average: Callable[[list[Tensor]], Tensor] = lambda g: g[-1], scale: float = 1.0, exact=False
    ):
        super().__init__(rows, columns)
        self.average, self.scale, self.exact = average, scale, exact

    def M(self) -> Tensor:
        m = self.average(self.seen)
        U, sigma, V = torch.linalg.svd(m, full_matrices=False)
        x = sigma / m.norm()
        values = self.scale * (torch.ones_like(x) if self.exact else quintic(x)) / sigma
        if self.rows <= self.columns:
            return torch.kron(U @ torch.diag(values) @ U.T, torch.eye(self.columns, dtype=m.dtype))
        return torch.kron(torch.eye(self.rows, dtype=m.dtype), V.T @ torch.diag(values) @ V)


class Schatten(Matrix):
    """γ' U Σˢ Vᵀ of the last gradient, as long as Muon's step."""

    advised = 0.0

    def __init__(self, rows, columns, s: float, scale: float = 1.0):
        super().__init__(rows, columns)
        self.s, self.scale = s, scale

    def M(self) -> Tensor:
        U, sigma, V = torch.linalg.svd(self.seen[-1], full_matrices=False)
        step = sigma**self.s
        values = self.scale * min(self.rows, self.columns) ** 0.5 / step.norm() * step / sigma
        if self.rows <= self.columns:
            return torch.kron(U @ torch.diag(values) @ U.T, torch.eye(self.columns, dtype=sigma.dtype))
        return torch.kron(torch.eye(self.rows, dtype=sigma.dtype), V.T @ torch.diag(values) @ V)


class Orthogonalized(Matrix):
    """The update of M₁ by Broyden, Fletcher, Goldfarb and Shanno that takes the last gradient g to γ·polar(M₁g).

    It is written as three products; the root is the one that M₁'s own root makes: (I + d wᵀ)P₁, w by solving for it.
    """

    advised = 0.0

    def __init__(self, of: Matrix, scale: float = 1.0):
        super().__init__(of.rows, of.columns)
        self.of, self.scale = of, scale

    @property
    def turn(self) -> int:
        return self.of.turn

    @turn.setter
    def turn(self, value: int) -> None:
        self.of.turn = value

    def see(self, g: Tensor) -> None:
        super().see(g)
        self.of.see(g)

    def step(self) -> tuple[Tensor, Tensor]:
        g, P = self.seen[-1].reshape(-1), self.of.P()
        U, _, V = torch.linalg.svd((P @ P.T @ g).reshape(self.rows, self.columns), full_matrices=False)
        return g, self.scale * (U @ V).reshape(-1)

    def M(self) -> Tensor:
        (g, d), P, eye = self.step(), self.of.P(), torch.eye(self.rows * self.columns, dtype=torch.float64)
        V = eye - torch.outer(g, d) / (g @ d)
        return V.T @ P @ P.T @ V + torch.outer(d, d) / (g @ d)

    def P(self) -> Tensor:
        (g, d), P = self.step(), self.of.P()
        b = torch.linalg.solve(P @ P.T, d)
        w = (((g @ d) / (d @ b)).sqrt() * b - g) / (g @ d)
        return P + torch.outer(d, w @ P)
