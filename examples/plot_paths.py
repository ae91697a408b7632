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
figure, axes = plt.subplots(1, 2, figsize=(8, 4), width_ratios=(1.5, 1))
for axis, name, to, height in ((axes[0], "p", torch.ones(2), 0.8), (axes[1], "z", scale, 3.2)):
    first, second = torch.meshgrid(torch.linspace(-2.6, 2.6, 200), torch.linspace(-height, height, 200), indexing="xy")
    points = torch.stack([first, second], -1).double() * to
    values = 0.5 * ((points @ H) * points).sum(-1)
    axis.contour(first, second, values, levels=[0.02, 0.1, 0.3, 0.8, 1.6, 3, 5, 8], colors="0.5", linewidths=0.6)
    for label, path_in_p, color in (("gradient descent in p", plain, "C1"), ("gradient descent in z", preconditioned, "C0")):
        axis.plot(*(path_in_p / to).T, "o-", color=color, markersize=4, linewidth=1.3, label=label)
    axis.set(title="p" if name == "p" else "z = P⁻¹p", xlabel=f"{name}₁", ylabel=f"{name}₂", aspect="equal")
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left")
plt.show()
