r"""Least squares on a model's values and derivatives at points, as in physics-informed networks: residuals, their Jacobian, natural steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from precond.algebra import vec
from precond.algebra.maps import Woodbury
from precond.algebra.vec import Vec

Field = Callable[[Tensor], Tensor]
"""u(x), the model at one point."""


@dataclass(frozen=True)
class Equation:
    """What should be zero at some points.

    Attributes:
        residual: a function of (u, x), x one point (d,) and u the model as a function of a point, whose derivatives ``torch.func`` takes
            (``grad``, ``hessian``, ``jvp``); it returns a number or a vector of numbers.
        points: (m, d).
        weight: w ≥ 0 of the mean square over the points.

    Example:
        >>> import torch
        >>> from torch.func import grad
        >>> def slope(u, x):  # u′ = 3
        ...     return grad(lambda x: u(x).sum())(x) - 3
        >>> equation = Equation(slope, points=torch.rand(4, 1))
        >>> equation.residual(lambda x: 5 * x, equation.points[0])
        tensor([2.])
    """

    residual: Callable[[Field, Tensor], Tensor]
    points: Tensor
    weight: float = 1.0


class Residuals:
    r"""r(p), the residuals of equations at their points, each divided by √(m/w): L(p) = ½‖r‖² = ½ Σ_e w_e · mean over points of residual².

    Args:
        model: a function of one point (d,) as of a batch of them, such as layers and activations; its parameters that require gradients are p.
        equations: the equations.

    Raises:
        ValueError: for no equations, points that are no matrix, or weights that are negative.

    Example:
        >>> from torch.func import grad
        >>> model = torch.nn.Linear(1, 1, bias=False)  # u = p x with u′ = 3
        >>> r = Residuals(model, [Equation(lambda u, x: grad(lambda x: u(x).sum())(x) - 3, torch.rand(4, 1))])
        >>> _ = next(natural_steps(r, damping=0.0))
        >>> model.weight.data.round(decimals=4)
        tensor([[3.]])
    """

    def __init__(self, model: nn.Module, equations: Sequence[Equation]):
        if not equations:
            raise ValueError("Residuals: equations is empty; give Equation(residual, points)")
        for i, e in enumerate(equations):
            if e.points.ndim != 2 or not len(e.points):
                raise ValueError(f"Residuals: equations[{i}].points must be a matrix (m, d), got shape {tuple(e.points.shape)}")
            if not e.weight >= 0:
                raise ValueError(f"Residuals: equations[{i}].weight must be >= 0, got {e.weight!r}")
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not named:
            raise ValueError(
                f"Residuals: {type(model).__name__} has no parameter that requires a gradient; call requires_grad_() on some"
            )
        self.model, self.equations = model, tuple(equations)
        self.names, self.params = tuple(named), tuple(named.values())

    def _of_point(self, e: Equation) -> Callable[[Vec, Tensor], Tensor]:
        scale = (e.weight / len(e.points)) ** 0.5

        def residual(params: Vec, x: Tensor) -> Tensor:
            given = dict(zip(self.names, params, strict=True))
            u = lambda x: torch.func.functional_call(self.model, given, (x,))  # noqa: E731
            return scale * e.residual(u, x).reshape(-1)

        return residual

    def __call__(self, params: Vec | None = None) -> Tensor:
        """r (m,), differentiable by the parameters."""
        p = self.params if params is None else params
        return torch.cat([torch.vmap(self._of_point(e), (None, 0))(p, e.points).flatten() for e in self.equations])

    def loss(self) -> Tensor:
        """½‖r‖², differentiable: what any other optimizer may be given."""
        return self().square().sum() / 2

    def linearized(self) -> tuple[Tensor, Tensor]:
        """(r (m,), R = ∂r/∂p (m, n)), the Jacobian point by point: its cost is a few gradients of all points, whatever their number."""
        values, rows = [], []
        p = vec.map_(Tensor.detach, self.params)
        for e in self.equations:
            f = self._of_point(e)

            def twice(p: Vec, x: Tensor, f: Callable[[Vec, Tensor], Tensor] = f) -> tuple[Tensor, Tensor]:
                r = f(p, x)
                return r, r

            jacobian, r = torch.vmap(torch.func.jacrev(twice, has_aux=True), (None, 0))(p, e.points)
            values.append(r.flatten())
            rows.append(torch.cat([t.flatten(0, 1).flatten(1) for t in jacobian], 1))
        return torch.cat(values).detach(), torch.cat(rows).detach()

    def preconditioner(self, damping: float) -> Woodbury:
        """P with P Pᵀ = (RᵀR + δI)⁻¹ at the current parameters."""
        return Woodbury(self.linearized()[1], damping, self.params)


def natural_steps(residuals: Residuals, damping: float = 1e-7, *, momentum: float = 0.0, halvings: int = 12) -> Iterator[float]:
    r"""Natural gradient descent on ½‖r‖², a step each time that the iterator is asked: p ← p − ηφ, with the loss after it.

    φ = μφ₋ + Rᵀ(RRᵀ + δI)⁻¹(r − μRφ₋), φ₋ that of the step before: with μ = 0 the Gauss–Newton step M∇L, M = (RᵀR + δI)⁻¹, which on the
    squared residuals of differential equations is the energy natural gradient's; with μ > 0 SPRING's. η is the one of 2, 1, ½, …, 2⁻ʰ
    with the smallest loss, or none where all are larger than before; and then δ, a multiple of the loss, is ten times as large.

    Args:
        residuals: r of the model whose parameters are stepped, in place.
        damping: δ/L ≥ 0: relative to the loss, so that steps turn into Gauss–Newton's as it falls; never below rounding, ε·tr RRᵀ/m.
        momentum: μ in [0, 1).
        halvings: h ≥ 0.

    Yields:
        The loss, as long as steps make it smaller; it ends where, of ten dampings in a row, none does.

    Raises:
        ValueError: for a negative damping, or momentum outside of [0, 1).

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1)
        >>> points = torch.linspace(0, 1, 5)[:, None]
        >>> residuals = Residuals(model, [Equation(lambda u, x: u(x) - (2 * x + 1), points)])
        >>> loss = next(natural_steps(residuals))  # linear least squares: one step
        >>> loss < 1e-6, model.weight.data.round(decimals=2), model.bias.data.round(decimals=2)
        (True, tensor([[2.]]), tensor([1.]))

    References:
        Müller & Zeinhofer (2023), Achieving high accuracy with PINNs via energy natural gradient descent; Goldshlager, Abrahamsen & Lin
        (2024), A Kaczmarz-inspired approach (SPRING); Yamashita & Fukushima (2001), On the rate of convergence of the Levenberg–Marquardt
        method; Guzmán-Cordero, Dangel, Goldshlager & Zeinhofer (2025), Improving energy natural gradient descent (Woodbury's form).
    """
    if not damping >= 0:
        raise ValueError(f"natural_steps: damping must be >= 0, got {damping!r}")
    if not 0 <= momentum < 1:
        raise ValueError(f"natural_steps: momentum must lie in [0, 1), got {momentum!r}")
    params, failed = residuals.params, 0
    before: Tensor | None = None
    r, R = residuals.linearized()
    loss = float(r.square().sum()) / 2
    while failed < 10 and loss > 0:
        least = torch.finfo(R.dtype).eps * float(R.square().sum(1).mean())
        P = Woodbury(R, max(damping * loss, least) * 10.0**failed, params)
        if before is None or not momentum:
            step = vec.flatten(P.fitted(r))
        else:
            step = momentum * before + vec.flatten(P.fitted(r - momentum * (R @ before)))
        old = vec.map_(lambda p: p.detach().clone(), params)
        eta, found = _best(residuals, old, vec.unflatten(step, old), loss, halvings)
        if eta == 0:
            failed, before = failed + 1, None
            continue
        loss, failed, before = found, max(0, failed - 1), step
        yield loss
        r, R = residuals.linearized()


def _best(residuals: Residuals, old: Vec, step: Vec, loss: float, halvings: int) -> tuple[float, float]:
    """(η, loss) with the smallest loss, and the parameters moved by it; (0, loss) where none is smaller than before."""
    best = (0.0, loss)
    with torch.no_grad():
        for k in range(-1, halvings + 1):
            eta = 2.0**-k
            moved = vec.add(old, step, alpha=-eta)
            found = float(residuals(moved).square().sum()) / 2
            if found < best[1]:
                best = (eta, found)
            elif best[0]:
                break  # past the smallest
        for p, q in zip(residuals.params, vec.add(old, step, alpha=-best[0]), strict=True):
            p.copy_(q)
    return best
