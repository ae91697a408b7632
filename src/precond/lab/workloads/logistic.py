r"""Logistic regression on raw features: how many iterations gradient descent needs in which coordinates.

One function for all: F(p) = mean cross entropy + λ‖P⁻¹p‖², P = U D of the exact mean and standard deviation of the features, so that
the penalty is that of the weights of standardized features, and the optimum is finite also where classes are separable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from precond import PreconditionedGD
from precond.analysis.convergence import optimal_lr, steps
from precond.lab.workloads.catalog import load_data
from precond.optim import recipes

SETS = ("wine", "breast-cancer")


@dataclass(frozen=True, eq=False)
class Logistic:
    """A problem in float64 with its optimum.

    Attributes:
        name: of the data set.
        X: (N, d) raw features, all examples of the set.
        y: (N,) classes 0 … K−1.
        l2: λ.
        P: (d+1, d+1) with [w; b] = P z for each class.
        optimum: (K, d+1) weights and bias of each class.
        lowest: F there.
    """

    name: str
    X: Tensor
    y: Tensor
    l2: float
    P: Tensor
    optimum: Tensor
    lowest: float

    @property
    def classes(self) -> int:
        """K."""
        return int(self.y.max()) + 1

    def value(self, W: Tensor) -> Tensor:
        """F of (K, d+1) weights and biases."""
        return _value(W, self.X, self.y, self.P, self.l2)

    def hessian(self, W: Tensor | None = None) -> Tensor:
        """At the optimum or elsewhere, ((K−1)(d+1))², on differences of classes: a constant that is added to all of them changes no class
        and is never excited from zero."""
        K, n = self.optimum.shape
        W = self.optimum if W is None else W
        H = torch.autograd.functional.hessian(lambda w: self.value(w.view(K, n)), W.flatten())
        Q = torch.kron(differences(K), torch.eye(n, dtype=torch.float64))
        return Q.T @ H @ Q

    def spectrum(self, P: Tensor) -> tuple[float, float]:
        """(λ_min, λ_max) of PᵀHP at the optimum; λ_min from the inverse, because it may be far below λ_max times the rounding."""
        whole = torch.kron(torch.eye(self.classes - 1, dtype=torch.float64), P)
        standard = torch.kron(torch.eye(self.classes - 1, dtype=torch.float64), self.P)
        H = self.hessian()
        largest = torch.linalg.eigvalsh(whole.T @ H @ whole)[-1].item()
        # In standardized coordinates the Hessian is well conditioned, so that its inverse is accurate.
        inverse = torch.linalg.inv(standard.T @ H @ standard)
        back = torch.linalg.solve(whole, standard)
        return 1 / torch.linalg.eigvalsh(back @ inverse @ back.T)[-1].item(), largest


def _value(W: Tensor, X: Tensor, y: Tensor, P: Tensor, l2: float) -> Tensor:
    z = torch.linalg.solve(P, W.T)
    return F.cross_entropy(X @ W[:, :-1].T + W[:, -1], y) + l2 * z.square().sum()


def differences(K: int) -> Tensor:
    """(K, K−1) orthonormal columns, each of sum 0.

    Example:
        >>> Q = differences(3)
        >>> torch.allclose(Q.T @ Q, torch.eye(2, dtype=torch.float64)), bool(Q.sum(0).abs().max() < 1e-12)
        (True, True)
    """
    return torch.linalg.svd(torch.ones(1, K, dtype=torch.float64), full_matrices=True)[2][1:].T.contiguous()


def standardizing(X: Tensor) -> Tensor:
    """P of [w; b] = P z: w = z_w/σ, b = z_b − μᵀw."""
    std, mean = torch.std_mean(X, 0, correction=0)
    P = torch.diag(torch.cat([1 / std, std.new_ones(1)]))
    P[-1, :-1] = -mean / std
    return P


def logistic(name: str, l2: float) -> Logistic:
    """A data set's problem, its optimum by Newton's method in standardized coordinates.

    Args:
        name: one of :data:`SETS`.
        l2: λ > 0.

    Raises:
        ValueError: for another name, or λ that is not positive.
    """
    if name not in SETS:
        raise ValueError(f"data must be one of {', '.join(SETS)}, got {name!r}")
    if not 0 < l2 < math.inf:
        raise ValueError(f"l2 must be > 0, so that the optimum is finite, got {l2:g}")
    parts = load_data(name).parts.values()
    X, y = torch.cat([part.inputs.double() for part in parts]), torch.cat([part.targets for part in parts])
    P = standardizing(X)
    K, n = int(y.max()) + 1, X.shape[1] + 1

    def of(z: Tensor) -> Tensor:
        return _value(z.view(K, n) @ P.T, X, y, P, l2)

    z = torch.zeros(K * n, dtype=torch.float64)
    for _ in range(100):
        g = torch.autograd.functional.jacobian(of, z)
        step = torch.linalg.solve(torch.autograd.functional.hessian(of, z), g)
        # Halve the step until the function falls; near the optimum rounding decides, and whole steps are right.
        t = 1.0
        while of(z - t * step) > of(z) + 1e-12 and t > 1e-6:
            t /= 2
        z = z - t * step
        if g.abs().max() < 1e-13:
            break
    return Logistic(name, X, y, l2, P, z.view(K, n) @ P.T, of(z).item())


@dataclass(frozen=True)
class Descent:
    """Gradient descent in some coordinates.

    Attributes:
        label: what it is called.
        kappa: κ(PᵀHP) at the optimum.
        lr: α.
        predicted: iterations that max |1 − αλ| at the optimum predicts for the gap to shrink to the tolerance.
        reached: iterations to the tolerance; None where it was not reached.
        iterations, gap: the trace, thinned, of (F − F*)/(F₀ − F*).
    """

    label: str
    kappa: float
    lr: float
    predicted: float
    reached: int | None
    iterations: tuple[int, ...]
    gap: tuple[float, ...]


METHODS = ("GD", "GD, cautious step", "GD, standardized data", "BNP, exact statistics", "BNP, its defaults")


def descents(problem: Logistic, tolerance: float = 1e-6, limit: int = 100_000) -> tuple[Descent, ...]:
    """Full-batch descent from zero by each of :data:`METHODS`, until (F − F*)/(F₀ − F*) ≤ tolerance.

    Learning rates are 2/(λ_min + λ_max) of the Hessian at the optimum; the cautious one is 1/λ_max at the start, where logistic
    losses are most curved. "GD, standardized data" is gradient descent in z, computed as such; BNP is the recipe on raw data, which
    takes its statistics from the forward pass, without damping and averages (``damping=0, decay=0``) and as it is by default.
    """
    d = problem.X.shape[1]
    one = torch.ones(len(problem.X), 1, dtype=torch.float64)
    std, mean = torch.std_mean(problem.X, 0, correction=0)
    raw, standardized = torch.cat([problem.X, one], 1), torch.cat([(problem.X - mean) / std, one], 1)
    I = torch.eye(d + 1, dtype=torch.float64)

    def plain(label: str, P: Tensor, Z: Tensor, A: Tensor, lr: float | None = None) -> Descent:
        low, high = problem.spectrum(P)
        lr = optimal_lr(low, high) if lr is None else lr
        return _described(label, low, high, lr, _plain(problem, Z, A, lr, tolerance, limit), tolerance)

    def bnp(label: str, **options: float) -> Descent:
        low, high = problem.spectrum(_map_of(problem, options))
        lr = optimal_lr(low, high)
        return _described(label, low, high, lr, _bnp(problem, options, lr, tolerance, limit), tolerance)

    inverse = torch.linalg.inv(problem.P)
    start = torch.linalg.eigvalsh(problem.hessian(torch.zeros_like(problem.optimum)))[-1].item()
    return (
        plain(METHODS[0], I, raw, inverse),
        plain(METHODS[1], I, raw, inverse, 1 / start),
        plain(METHODS[2], problem.P, standardized, I),
        bnp(METHODS[3], damping=0.0, decay=0.0),
        bnp(METHODS[4]),
    )


def _model(problem: Logistic) -> nn.Linear:
    model = nn.Linear(problem.X.shape[1], problem.classes).double()
    for p in model.parameters():
        nn.init.zeros_(p)
    return model


def _closure(problem: Logistic, model: nn.Linear, optimizer: PreconditionedGD) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        z = torch.linalg.solve(problem.P, torch.cat([model.weight, model.bias[:, None]], 1).T)
        loss = F.cross_entropy(model(problem.X), problem.y) + problem.l2 * z.square().sum()
        loss.backward()
        return loss

    return closure


def _map_of(problem: Logistic, options: Mapping[str, float]) -> Tensor:
    """The optimizer's own P after one step of length zero, for one class, in the order [w; b]."""
    model = _model(problem)
    optimizer = recipes.bnp(model, 0.0, **options)  # type: ignore[arg-type]
    optimizer.step(_closure(problem, model, optimizer))
    P, d = optimizer.map().to_dense(), problem.X.shape[1]
    mine = torch.cat([torch.arange(d), torch.tensor([problem.classes * d])])
    return P[mine][:, mine]


def _bnp(problem: Logistic, options: Mapping[str, float], lr: float, tolerance: float, limit: int) -> list[float]:
    model = _model(problem)
    optimizer = recipes.bnp(model, lr, **options)  # type: ignore[arg-type]
    closure = _closure(problem, model, optimizer)
    gaps: list[float] = []
    for _ in range(limit + 1):
        # The closure's loss is that before the step.
        gaps.append(optimizer.step(closure).item() - problem.lowest)
        if not math.isfinite(gaps[-1]) or gaps[-1] <= tolerance * gaps[0]:
            break
    return gaps


def _plain(problem: Logistic, Z: Tensor, A: Tensor, lr: float, tolerance: float, limit: int) -> list[float]:
    """Gradient descent without any optimizer, on features Z (N, d+1) with the penalty λ‖A w‖²."""
    W = torch.zeros(problem.classes, Z.shape[1], dtype=torch.float64)
    hot, metric = F.one_hot(problem.y).double(), A.T @ A
    gaps: list[float] = []
    for _ in range(limit + 1):
        a, penalized = Z @ W.T, W @ metric
        gaps.append((F.cross_entropy(a, problem.y) + problem.l2 * (W * penalized).sum()).item() - problem.lowest)
        if not math.isfinite(gaps[-1]) or gaps[-1] <= tolerance * gaps[0]:
            break
        W = W - lr * ((a.softmax(1) - hot).T @ Z / len(Z) + 2 * problem.l2 * penalized)
    return gaps


def _described(label: str, low: float, high: float, lr: float, gaps: list[float], tolerance: float) -> Descent:
    # The error shrinks by r per step, and the gap by r².
    predicted = steps(max(abs(1 - lr * low), abs(1 - lr * high)), math.sqrt(tolerance))
    reached = len(gaps) - 1 if gaps[-1] <= tolerance * gaps[0] else None
    # Each iteration at first, then as many for each decade: enough for a figure with a logarithmic axis.
    kept = sorted({0, len(gaps) - 1, *(min(len(gaps) - 1, round(10 ** (i / 40))) for i in range(40 * 7))})
    return Descent(label, high / low, lr, predicted, reached, tuple(kept), tuple(gaps[k] / gaps[0] for k in kept))
