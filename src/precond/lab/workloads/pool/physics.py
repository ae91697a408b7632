"""Physics-informed networks (Raissi et al., 2019): the loss is the residual of a differential equation; boundary values hold exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from precond.lab.workloads.data import Part
from precond.lab.workloads.pool.member import Member, in_parts
from precond.lab.workloads.problem import Tensors

π = torch.pi


@dataclass(frozen=True)
class Equation:
    """L(u) = f on a rectangle.

    Attributes:
        words: the equation and its boundary values.
        low, high: corners of the rectangle.
        field: (network's output N, x, y or t) ↦ u with the boundary values, for any N.
        operator: (u, u_x, u_y, u_xx, u_yy) ↦ L(u).
        source: (x, y) ↦ f, divided with L by their common scale, so that the loss of u = 0 is about 1 where f is not 0.
    """

    words: str
    low: tuple[float, float]
    high: tuple[float, float]
    field: Callable[[Tensor, Tensor, Tensor], Tensor]
    operator: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    source: Callable[[Tensor, Tensor], Tensor]


def _square(n: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return n * x * (1 - x) * y * (1 - y)


EQUATIONS = {
    "Poisson": Equation(
        "-Δu = f on the unit square, u = 0 on its boundary, u = sin(πx)sin(πy) + sin(3πx)sin(2πy)/4",
        (0.0, 0.0), (1.0, 1.0), _square,
        lambda u, u_x, u_y, u_xx, u_yy: -(u_xx + u_yy) / 20,
        lambda x, y: (2 * π**2 * (π * x).sin() * (π * y).sin() + 13 * π**2 / 4 * (3 * π * x).sin() * (2 * π * y).sin()) / 20,
    ),
    "Burgers": Equation(
        "u_t + u u_x = 0.02 u_xx for -1 < x < 1 and 0 < t < 1, u = -sin(πx) at t = 0, u = 0 at x = ±1",
        (-1.0, 0.0), (1.0, 1.0), lambda n, x, t: -(π * x).sin() + t * (1 - x**2) * n,
        lambda u, u_x, u_t, u_xx, u_tt: u_t + u * u_x - 0.02 * u_xx,
        lambda x, t: torch.zeros_like(x),
    ),
    "Helmholtz": Equation(
        "Δu + 16u = f on the unit square, u = 0 on its boundary, u = sin(πx)sin(4πy)",
        (0.0, 0.0), (1.0, 1.0), _square,
        lambda u, u_x, u_y, u_xx, u_yy: (u_xx + u_yy + 16 * u) / 70,
        lambda x, y: (16 - 17 * π**2) * (π * x).sin() * (4 * π * y).sin() / 70,
    ),
    "Allen-Cahn": Equation(
        "u_t = 0.01 u_xx + 2(u - u³) for -1 < x < 1 and 0 < t < 1, u = x²cos(πx) at t = 0, u = -1 at x = ±1",
        (-1.0, 0.0), (1.0, 1.0), lambda n, x, t: x**2 * (π * x).cos() + t * (1 - x**2) * n,
        lambda u, u_x, u_t, u_xx, u_tt: u_t - 0.01 * u_xx - 2 * (u - u**3),
        lambda x, t: torch.zeros_like(x),
    ),
}  # fmt: skip


class Residual(nn.Module):
    """Points (N, 2) ↦ L(u) there, (N, 1), u made of an MLP with tanh; derivatives by autograd, in evaluation too."""

    middle: Tensor
    scale: Tensor

    def __init__(self, equation: Equation, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.equation = equation
        low, high = torch.tensor(equation.low), torch.tensor(equation.high)
        self.register_buffer("middle", (low + high) / 2, persistent=False)
        self.register_buffer("scale", (high - low) / 2, persistent=False)
        sizes = zip((2, *widths[:-1]), widths, strict=True)
        self.body = nn.Sequential(*(layer for a, b in sizes for layer in (nn.Linear(a, b), nn.Tanh())))
        self.head = nn.Linear(widths[-1], 1)

    def forward(self, points: Tensor) -> Tensor:
        with torch.enable_grad():
            x, y = (points[:, i : i + 1].detach().requires_grad_() for i in (0, 1))
            inputs = (torch.cat([x, y], 1) - self.middle) / self.scale
            u = self.equation.field(self.head(self.body(inputs)), x, y)
            u_x, u_y = torch.autograd.grad(u.sum(), (x, y), create_graph=True)
            (u_xx,) = torch.autograd.grad(u_x.sum(), x, create_graph=True)
            # What is first-order in one variable needs no second derivative there, but one sweep computes both kinds.
            (u_yy,) = torch.autograd.grad(u_y.sum(), y, create_graph=True)
            return self.equation.operator(u, u_x, u_y, u_xx, u_yy)


@cache
def _physics(name: Literal["Poisson", "Burgers", "Helmholtz", "Allen-Cahn"], seed: int) -> Tensors:
    equation = EQUATIONS[name]
    low, high = torch.tensor(equation.low), torch.tensor(equation.high)
    points = low + (high - low) * torch.rand(3072, 2, generator=torch.Generator().manual_seed(seed))
    parts = in_parts(Part(points, equation.source(points[:, :1], points[:, 1:])))
    return Tensors(
        name,
        f"{equation.words}. Points drawn evenly (seed {seed}).",
        parts,
        partial(Residual, equation, (48, 48, 48)),
        F.mse_loss,
        None,
        128,
        256,
        "MLP 2-48-48-48-1, tanh, with the boundary values built in",
        "mean squared residual",
    )


MEMBERS = (
    Member("PINN, Poisson", "PINNs", 800, partial(_physics, "Poisson", 79)),
    Member("PINN, Burgers", "PINNs", 800, partial(_physics, "Burgers", 80)),
    Member("PINN, Helmholtz", "PINNs", 800, partial(_physics, "Helmholtz", 81)),
    Member("PINN, Allen-Cahn", "PINNs", 800, partial(_physics, "Allen-Cahn", 82)),
)
