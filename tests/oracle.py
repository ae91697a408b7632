"""Gradient descent in z, spelled out: dense matrices and autograd in float64, and no line of the library.

    z = P⁻¹p;   z ← z − α ∇_z [ L(Pz) + λR ];   p = Pz          with P frozen within the step

All parameters are one flat vector. ``tensors`` are the index ranges that the tensors of a model take in it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Number = float | Callable[[int], float]
"""λ or ρ, or a function of the step (from 1)."""


def weights(decay: float, t: int, start: str) -> Tensor:
    """The weights of a₁ … a_t in a running mean; they sum to 1 when it starts at the first value."""
    w = torch.tensor([(1 - decay) * decay ** (t - s) for s in range(1, t + 1)], dtype=torch.float64)
    if start == "first_gradient":
        w[0] = decay ** (t - 1)
    return w


def mean(history: Sequence[Tensor], w: Tensor) -> Tensor:
    return (torch.stack(list(history)) * w[:, None]).sum(0)


def root(symmetric: Tensor, power: float) -> Tensor:
    """A power of a symmetric positive matrix."""
    s, V = torch.linalg.eigh(symmetric)
    return V @ torch.diag(s**power) @ V.T


def damped(P: Tensor, delta: float, blocks: Sequence[Tensor]) -> Tensor:
    """A root of (M⁻¹ + δ·mean(eig(M⁻¹))·I)⁻¹ block by block: P(I + δd̄PᵀP)^(−1/2)."""
    out = P.clone()
    for i in blocks:
        B = P[i][:, i]
        d = torch.linalg.eigvalsh(torch.linalg.inv(B @ B.T)).mean()
        out[i[:, None], i] = B @ root(torch.eye(len(i), dtype=P.dtype) + delta * d * B.T @ B, -0.5)
    return out


# --- preconditioners: histories of gradients → P -------------------------------------------------------------------------


class Preconditioner:
    """P = F N. The momentum of cotangents is an average of y = Fᵀg, each y with the F of its step."""

    def P(self) -> Tensor:
        raise NotImplementedError

    def F(self) -> Tensor:
        return torch.eye(len(self.P()), dtype=torch.float64)


class Diagonal(Preconditioner):
    """P = diag(h^(−1/2)), h from all gradients so far."""

    advised = 0.1
    diagonal = True

    def __init__(self, tensors: Sequence[Tensor], h: Callable[[list[Tensor]], Tensor]):
        self.tensors, self.h, self.seen = tensors, h, []

    def see(self, g: Tensor) -> None:
        self.seen.append(g)

    def P(self) -> Tensor:
        return torch.diag(self.h(self.seen) ** -0.5)

    def damped(self, delta: float | None) -> Tensor:
        return damped(self.P(), self.advised if delta is None else delta, self.tensors)


def adagrad(eps: float = 1e-10, initial: float = 0.0, lr_decay: float = 0.0):
    def h(g: list[Tensor]) -> Tensor:
        return ((initial + sum(x**2 for x in g)).sqrt() + eps) * (1 + (len(g) - 1) * lr_decay)

    return lambda tensors: Diagonal(tensors, h)


def rms(decay=0.999, eps=1e-8, start="zero", bias_correction=True, centered=False, amsgrad=False):
    def r(g: list[Tensor]) -> Tensor:
        w = weights(decay, len(g), start)
        square = mean([x**2 for x in g], w)
        return square - mean(g, w) ** 2 if centered else square

    def h(g: list[Tensor]) -> Tensor:
        out = torch.stack([r(g[:t]) for t in range(1, len(g) + 1)]).amax(0) if amsgrad else r(g)
        return (out / weights(decay, len(g), start).sum()).sqrt() + eps if bias_correction else out.sqrt() + eps

    return lambda tensors: Diagonal(tensors, h)


class Given(Preconditioner):
    """A fixed matrix P; damped over all of it, or over the blocks that it states."""

    advised = 0.0

    def __init__(self, matrix: Tensor, blocks: Sequence[Tensor] = (), diagonal: bool = False):
        self.matrix, self.blocks, self.diagonal = matrix, blocks or [torch.arange(len(matrix))], diagonal

    def see(self, g: Tensor) -> None:
        pass

    def P(self) -> Tensor:
        return self.matrix

    def damped(self, delta: float | None) -> Tensor:
        return damped(self.matrix, self.advised if delta is None else delta, self.blocks)


class Chain(Preconditioner):
    """P = P₁P₂, P₂ adapting to P₁ᵀg, with the momentum in z₁ too.

    A ``structured`` P₁ stays as it is and P₂ is damped; else the product is, as one map.
    """

    def __init__(self, outer, inner, tensors: Sequence[Tensor], structured: bool = False):
        self.outer, self.inner, self.structured = outer, inner, structured
        self.diagonal, self.advised = outer.diagonal and inner.diagonal, inner.advised
        self.blocks = tensors if self.diagonal else [torch.cat(list(tensors))]

    def see(self, g: Tensor) -> None:
        self.outer.see(g)
        self.inner.see(self.outer.P().T @ g)

    def P(self) -> Tensor:
        return self.outer.P() @ self.inner.P()

    def F(self) -> Tensor:
        return self.outer.P() @ self.inner.F()

    def damped(self, delta: float | None) -> Tensor:
        if self.structured:
            return self.outer.P() @ self.inner.damped(delta)
        return damped(self.P(), self.advised if delta is None else delta, self.blocks)


class Parts(Preconditioner):
    """Each part of the vector with a preconditioner of its own; each is damped as it advises."""

    def __init__(self, parts: Sequence[tuple[Tensor, object]], diagonal: bool = True):
        self.parts, self.diagonal, self.advised = parts, diagonal, max(part.advised for _, part in parts)

    def see(self, g: Tensor) -> None:
        for i, part in self.parts:
            part.see(g[i])

    def _place(self, matrices: Sequence[Tensor]) -> Tensor:
        n = sum(len(i) for i, _ in self.parts)
        out = torch.zeros(n, n, dtype=torch.float64)
        for (i, _), matrix in zip(self.parts, matrices, strict=True):
            out[i[:, None], i] = matrix
        return out

    def P(self) -> Tensor:
        return self._place([part.P() for _, part in self.parts])

    def F(self) -> Tensor:
        return self._place([part.F() for _, part in self.parts])

    def damped(self, delta: float | None) -> Tensor:
        return self._place([part.damped(delta) for _, part in self.parts])


# --- penalties -----------------------------------------------------------------------------------------------------------


@dataclass
class Penalty:
    """λR. ``each`` scales λ entry by entry; where it is 0 (or False), an entry takes no part."""

    lam: Number
    space: str = "z"
    each: Tensor | float = 1.0

    def at(self, t: int) -> Tensor | float:
        return (self.lam(t) if callable(self.lam) else self.lam) * self.each


@dataclass
class L2(Penalty):
    def R(self, lam, x: Tensor) -> Tensor:
        return (lam * x**2).sum()


@dataclass
class L1(Penalty):
    proximal: bool = False

    def R(self, lam, x: Tensor) -> Tensor:
        return (lam * x.abs()).sum()


@dataclass
class GradientNorm(Penalty):
    power: int = 2
    q: float = 2
    damping: float | None = None

    def R(self, lam, y: Tensor) -> Tensor:
        """λ‖y‖_q^s; where λ differs between entries, the function whose gradient in y is λ∘∇‖y‖_q^s."""
        took_part = y if not isinstance(lam, Tensor) else y * (lam != 0)
        size = took_part.abs()
        length = {1: size.sum(), 2: (size**2).sum().sqrt(), float("inf"): size.max()}.get(self.q)
        if length is None:
            length = (size**self.q).sum() ** (1 / self.q)
        if not isinstance(lam, Tensor):
            return lam * length**self.power
        (slope,) = torch.autograd.grad(length**self.power, y, retain_graph=True)
        return (lam * slope.detach() * y).sum()


@dataclass
class SAM(Penalty):
    """``lam`` is ρ."""

    adaptive: bool = False
    eta: float = 0.01
    damping: float | None = None

    def shift(self, rho, y: Tensor, w: Tensor) -> Tensor:
        """The ascent in the coordinates w of the ball."""
        y = y if not isinstance(rho, Tensor) else y * (rho != 0)
        T = w.abs() + self.eta if self.adaptive else torch.ones_like(w)
        return rho * T**2 * y / (T * y).norm()


@dataclass
class Bend(Penalty):
    """Another step in the coordinates w: lengths are those of ``pieces``, rows those of ``rows``. ``lam`` is its number."""

    pieces: Sequence[Tensor] = ()
    rows: Sequence[Tensor] = ()
    stage: int = 0
    made: Tensor | None = None

    def bent(self, s: Number, w: Tensor, z: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError

    def back(self, z: Tensor, before: Tensor) -> Tensor:
        """Coordinates after the step → those to end at."""
        return z


@dataclass
class Cautious(Bend):
    def bent(self, s, w, z, y):
        mask = torch.tensor([1.0 if a * b > 0 else 1.0 - float(s) for a, b in zip(w, y, strict=True)], dtype=w.dtype)
        return torch.cat([w[i] * mask[i] / max(1e-3, mask[i].mean()) for i in self.pieces])


@dataclass
class CautiousL2(Bend):
    stage: int = 3

    def bent(self, s, w, z, y):
        return torch.stack([a + 2 * s * b if m * b > 0 else a for a, b, m in zip(w, z, self.made, strict=True)])


@dataclass
class RadialBrake(Bend):
    stage: int = 1

    def bent(self, s, w, z, y):
        w = w.clone()
        for i in self.pieces:
            along = (w[i] @ z[i]) / (z[i] @ z[i]) if z[i].any() else 0.0
            if along < 0:
                w[i] = w[i] - s * along * z[i]
        return w


@dataclass
class RowFloor(Bend):
    stage: int = 2

    def bent(self, s, w, z, y):
        w = w.clone()
        for i in self.rows:
            if 0 < w[i].norm() < s * z[i].norm():
                w[i] = w[i] / w[i].norm() * s * z[i].norm()
        return w


@dataclass
class Hyperball(Bend):
    stage: int = 4

    def bent(self, s, w, z, y):
        w = w.clone()
        for i in self.pieces:
            if w[i].norm() > 0 and z[i].norm() > 0:
                w[i] = s * w[i] / w[i].norm() * z[i].norm()
        return w

    def back(self, z, before):
        z = z.clone()
        for i in self.pieces:
            if z[i].norm() > 0 and before[i].norm() > 0:
                z[i] = z[i] / z[i].norm() * before[i].norm()
        return z


# --- the step ------------------------------------------------------------------------------------------------------------


@dataclass
class Momentum:
    beta: float = 0.9
    kind: str = "ema"
    start: str = "zero"
    bias_correction: bool = True
    of: str = "cotangent"
    dampening: float = 0.0

    def of_history(self, a: Sequence[Tensor]) -> Tensor:
        t = len(a)
        w = weights(self.beta, t, self.start)
        if self.kind == "ema":
            return mean(a, w / w.sum() if self.bias_correction else w)
        w = torch.tensor([(1 - self.dampening) * self.beta ** (t - s) for s in range(1, t + 1)], dtype=torch.float64)
        if self.start == "first_gradient":
            w[0] = self.beta ** (t - 1)
        return mean(a, w) if self.kind == "heavy_ball" else (1 - self.dampening) * a[-1] + self.beta * mean(a, w)


def gradient(f: Callable[[Tensor], Tensor], x: Tensor, create_graph: bool = False) -> Tensor:
    x = x if create_graph else x.detach().requires_grad_()
    (g,) = torch.autograd.grad(f(x), x, create_graph=create_graph)
    return g


@dataclass
class Descent:
    """p after each :meth:`step`. ``alpha`` may hold one learning rate per entry (of p).

    ``statistics_from``: the gradient that P is built from is that of L (``"loss"``) or that of L + λR (``"total"``); where R
    itself needs P, it takes the one before the step (``"lagged"``; in the first step the one that ∇L makes).
    """

    loss: Callable[[Tensor], Tensor]
    p: Tensor
    alpha: float | Tensor
    preconditioner: object
    penalties: Sequence[Penalty] = ()
    momentum: Momentum | None = None
    statistics_from: str = "loss"
    max_norm: float | None = None
    averaged: list[Tensor] = field(default_factory=list)
    t: int = 0

    def step(self) -> Tensor:
        self.t += 1
        g = gradient(self.loss, self.p)
        self.lens = self.preconditioner
        if self.statistics_from == "lagged":
            self.lens = copy.deepcopy(self.preconditioner)
            if self.t == 1:
                self.lens.see(g)
        if self.statistics_from != "loss":
            g = gradient(self._through(torch.eye(len(g), dtype=g.dtype)), self.p)
        self.preconditioner.see(g)
        P = self.preconditioner.P()
        z = torch.linalg.solve(P, self.p)
        slope = gradient(self._through(P), z)
        if self.max_norm is not None:
            slope = slope * min(1.0, self.max_norm / (float(slope.norm()) + 1e-6))
        bends = sorted((b for b in self.penalties if isinstance(b, Bend)), key=lambda b: b.stage)
        u = P @ self._averaged(P, slope)
        made = u
        for bend in bends:
            u = self._bent(bend, P, u, made, torch.linalg.solve(P.T, slope))
        step = torch.linalg.solve(P, u) + gradient(self._past, z)
        z = z - (self.alpha * step if isinstance(self.alpha, float) else torch.linalg.solve(P, self.alpha * (P @ step)))
        before, self.p = self.p, self._proximal(P, z).detach()
        for bend in bends:
            C, mask = self._coordinates(bend, P)
            z = torch.linalg.solve(C, self.p)
            self.p = self.p + C @ (mask * (bend.back(mask * z, mask * torch.linalg.solve(C, before)) - mask * z))
        return self.p

    def _coordinates(self, bend: Bend, P: Tensor) -> tuple[Tensor, Tensor]:
        """The map to p and which coordinates take part."""
        identity = torch.eye(len(P), dtype=P.dtype)
        return (identity if bend.space == "p" else P), torch.ones(len(P), dtype=P.dtype) * bend.each

    def _bent(self, bend: Bend, P: Tensor, u: Tensor, made: Tensor, g: Tensor) -> Tensor:
        C, mask = self._coordinates(bend, P)
        w, z, y = mask * torch.linalg.solve(C, u), mask * torch.linalg.solve(C, self.p), mask * (C.T @ g)
        bend.made = mask * torch.linalg.solve(C, made)
        return u + C @ (mask * (bend.bent(bend.lam, w, z, y) - w))

    def _through(self, P: Tensor) -> Callable[[Tensor], Tensor]:
        """z ↦ what momentum and M act on: L at (perturbed) Pz, penalties of p and of gradients."""
        shift = torch.zeros_like(self.p)
        for penalty in self.penalties:
            if isinstance(penalty, SAM):
                shift = self._shift(penalty)

        def F(z: Tensor) -> Tensor:
            p = P @ z
            out = self.loss(p + shift)
            for penalty in self.penalties:
                if isinstance(penalty, GradientNorm):
                    y = self._chart(penalty).T @ gradient(self.loss, p, create_graph=True)
                    out = out + penalty.R(penalty.at(self.t), y)
                elif isinstance(penalty, L1 | L2) and penalty.space == "p" and not getattr(penalty, "proximal", False):
                    out = out + penalty.R(penalty.at(self.t), p)
            return out

        return F

    def _past(self, z: Tensor) -> Tensor:
        """z ↦ the penalties of z itself, which momentum does not average."""
        out = 0 * z.sum()
        for penalty in self.penalties:
            if isinstance(penalty, L1 | L2) and penalty.space == "z" and not getattr(penalty, "proximal", False):
                out = out + penalty.R(penalty.at(self.t), z)
        return out

    def _chart(self, penalty: GradientNorm | SAM) -> Tensor:
        """The map from the coordinates in which a penalty measures lengths to p."""
        identity = torch.eye(len(self.p), dtype=self.p.dtype)
        return identity if penalty.space == "p" else self.lens.damped(penalty.damping)

    def _shift(self, penalty: SAM) -> Tensor:
        C = self._chart(penalty)
        w = torch.linalg.solve(C, self.p)
        return C @ penalty.shift(penalty.at(self.t), gradient(lambda w: self.loss(C @ w), w), w)

    def _averaged(self, P: Tensor, slope: Tensor) -> Tensor:
        """The running average of cotangents y = FᵀP⁻ᵀ∇_z, or of tangents P∇_z, in z."""
        if self.momentum is None:
            return slope
        if self.momentum.of == "cotangent":
            F = self.preconditioner.F()
            self.averaged.append(F.T @ torch.linalg.solve(P.T, slope))
            return P.T @ torch.linalg.solve(F.T, self.momentum.of_history(self.averaged))
        self.averaged.append(P @ slope)
        return torch.linalg.solve(P, self.momentum.of_history(self.averaged))

    def _proximal(self, P: Tensor, z: Tensor) -> Tensor:
        for penalty in self.penalties:
            if isinstance(penalty, L1) and penalty.proximal:
                threshold = self.alpha * penalty.at(self.t) * torch.ones_like(z)
                if penalty.space == "z":
                    z = soft(z, threshold)
                else:
                    z = torch.linalg.solve(P, soft(P @ z, threshold * torch.diag(P @ P.T)))
        return P @ z


def soft(x: Tensor, threshold: Tensor) -> Tensor:
    """argmin_u (u − x)²/2 + threshold·|u|."""
    return torch.where(x > threshold, x - threshold, torch.where(x < -threshold, x + threshold, torch.zeros_like(x)))
