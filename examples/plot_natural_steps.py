"""
Natural steps on a differential equation
========================================

A small network is to solve −Δu = f on a square. The loss is the sum of squared residuals at points inside and on the
boundary. Such losses are badly conditioned: Adam creeps. A natural step solves least squares: M = (RᵀR + δI)⁻¹, R the
Jacobian of all residuals. The network is small enough to make that step in some hundredths of a second.
"""

import time

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.func import grad

import precond
from precond.analysis.curvature import Equation, Residuals, natural_steps


def exact(x):
    return torch.sin(torch.pi * x[..., 0]) * torch.sin(torch.pi * x[..., 1])


def laplacian(u, x):
    def along(k):
        return grad(lambda x: grad(lambda x: u(x).sum())(x)[k])(x)[k]

    return along(0) + along(1)


# %%
# The equation
# ------------
# f = 2π² sin(πx₁) sin(πx₂), so that the solution is known. u = 0 on the boundary.

torch.manual_seed(0)
inside = torch.rand(100, 2, dtype=torch.float64)
edge = torch.rand(15, dtype=torch.float64)
boundary = torch.cat(
    [torch.stack(pair, 1) for pair in ((edge, 0 * edge), (edge, 0 * edge + 1), (0 * edge, edge), (0 * edge + 1, edge))]
)


def residuals_of(net):
    poisson = Equation(lambda u, x: laplacian(u, x) + 2 * torch.pi**2 * exact(x), inside)
    zero = Equation(lambda u, x: u(x), boundary)
    return Residuals(net, [poisson, zero])


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1)).double()


test = torch.rand(1000, 2, dtype=torch.float64)


def error(net):
    with torch.no_grad():
        wrong = net(test)[:, 0] - exact(test)
        return float(wrong.norm() / exact(test).norm())


# %%
# Two ways
# --------
# Adam gets a decaying rate, the best of 0.003, 0.01, 0.03, 0.1 and 0.3, and somewhat more time. The natural steps choose their own lengths.


def adam(steps=150, lr=0.03):
    net = network()
    residuals = residuals_of(net)
    optimizer = precond.adam(net, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        residuals.loss().backward()
        optimizer.step()
        schedule.step()
        yield error(net)


def natural(steps=30):
    net = network()
    for _, _ in zip(range(steps), natural_steps(residuals_of(net)), strict=False):
        yield error(net)


figure, axis = plt.subplots(figsize=(7, 4))
for name, errors in {"Adam": adam(), "natural steps": natural()}.items():
    began, points = time.process_time(), []
    for wrong in errors:
        points.append((time.process_time() - began, wrong))
    axis.semilogy(*zip(*points, strict=True), label=f"{name}, {len(points)} steps")
    print(f"{name:14} relative error {points[-1][1]:.1e} after {len(points)} steps, {points[-1][0]:.1f} s of one core")
axis.set(xlabel="seconds of one core", ylabel="relative error of u")
axis.legend()
plt.show()
