"""
One descent, two maps
=====================

A loss with a steep and a flat direction. In p, gradient descent bounces across the valley and creeps along it. A
preconditioner is a map p = P z; in z the same valley is round, and gradient descent walks straight to the bottom. The path
at the left, drawn through P, is the path at the right.
"""

import matplotlib.pyplot as plt
import torch

import precond

H = torch.tensor([[1.0, 0.0], [0.0, 30.0]], dtype=torch.float64)
start = torch.tensor([-2.0, 0.6], dtype=torch.float64)


def loss(p):
    return 0.5 * p @ H @ p


def path(make, steps):
    p = torch.nn.Parameter(start.clone())
    optimizer = make([p])
    points = [start]
    for _ in range(steps):
        optimizer.zero_grad()
        loss(p).backward()
        optimizer.step()
        points.append(p.detach().clone())
    return torch.stack(points)


# %%
# The best rates
# --------------
# Gradient descent has its best rate 2/(λ_min + λ_max), which is 2/31. P = diag(1, 1/√20) makes the curvatures 1 and 1.5.

P = precond.Diagonal((torch.tensor([1.0, 20**-0.5], dtype=torch.float64),))
plain = path(lambda params: precond.sgd(params, lr=2 / 31), steps=30)
preconditioned = path(lambda params: precond.PreconditionedGD(params, lr=2 / 2.5, preconditioner=precond.Fixed(P)), steps=30)
for name, points in {"in p": plain, "in z": preconditioned}.items():
    print(f"gradient descent {name}: loss {loss(points[5]):.1e} after 5 steps, {loss(points[30]):.1e} after 30")

# %%
# Both paths, in both coordinates
# -------------------------------

scale = P.to_dense().diagonal()
figure, axes = plt.subplots(1, 2, figsize=(9, 3.8))
for axis, name, to, curvature in (
    (axes[0], "p", torch.ones(2), H),
    (axes[1], "z = P⁻¹p", scale, torch.diag(scale) @ H @ torch.diag(scale)),
):
    a, b = torch.meshgrid(
        torch.linspace(-2.6, 2.6, 200),
        torch.linspace(-3.2, 3.2, 200) if name != "p" else torch.linspace(-1, 1, 200),
        indexing="xy",
    )
    height = 0.5 * (curvature[0, 0] * a**2 + curvature[1, 1] * b**2)
    axis.contour(a, b, height, levels=[0.02, 0.1, 0.3, 0.8, 1.6, 3, 5, 8], colors="0.5", linewidths=0.6)
    for label, points, color in (("gradient descent in p", plain, "C1"), ("gradient descent in z", preconditioned, "C0")):
        axis.plot(*(points / to).T, "o-", color=color, markersize=4, linewidth=1.3, label=label)
    axis.set(title=name, xlabel=f"{name[0]}₁", ylabel=f"{name[0]}₂")
axes[0].legend(loc="lower right")
plt.show()
