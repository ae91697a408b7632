"""
Sharpness-aware minimization in p and in z
==========================================

SAM descends the gradient at p + δ, where δ is the steepest ascent within a ball. Whose ball? In p it is round in the
parameters. In z it is round in the coordinates of the preconditioner, which is where the optimizer works. Both are one
word apart.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import precond

# %%
# Few images, many parameters: a setting where regularization matters.

images, labels = load_digits(return_X_y=True)
x, y = torch.as_tensor(images, dtype=torch.float32) / 16, torch.as_tensor(labels)
x_train, y_train, x_test, y_test = x[:100], y[:100], x[100:], y[100:]


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 10))


# %%
# Two calls
# ---------
# ``probe`` moves the parameters to p + δ and says that it wants another gradient. ``step`` finds them back, bit for bit.
# The optimizer was given the model, so the second pass sees the same dropout masks as the first.


def fit(regularizers, steps=150, **options):
    model = make_model()
    optimizer = precond.adamw(model, lr=3e-3, regularizers=regularizers, **options)
    draw = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = torch.randint(len(x_train), (32,), generator=draw)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x_train[batch]), y_train[batch]).backward()
        while optimizer.probe():
            nn.functional.cross_entropy(model(x_train[batch]), y_train[batch]).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        return nn.functional.cross_entropy(model(x_test), y_test).item()


# %%
# Radii
# -----
# The two spaces measure length differently, so each has its own range of ρ. In p there is a second choice: Adam's moments
# see the perturbed gradient (the default, as in SAM wrappers) or the clean one (``statistics_from="loss"``). One seed of
# one small problem: this shows how to compare, and settles nothing.

variants = {
    "p": ([0.01, 0.03, 0.1], {}),
    'p, statistics_from="loss"': ([0.01, 0.03, 0.1], {"statistics_from": "loss"}),
    "z": ([0.0003, 0.001, 0.003], {}),
}
plain = fit([])
figure, axes = plt.subplots(1, 3, figsize=(10, 3.3), sharey=True, layout="constrained")
for axis, (name, (radii, options)) in zip(axes, variants.items(), strict=True):
    losses = [fit([precond.SAM(rho, space=name[0])], **options) for rho in radii]
    axis.semilogx(radii, losses, "o-", label="SAM")
    axis.axhline(plain, color="gray", linestyle="--", label="none")
    axis.set(xlabel="ρ", title=name)
    print(name.ljust(28), "  ".join(f"ρ={rho:g}: {loss:.3f}" for rho, loss in zip(radii, losses, strict=True)))
axes[0].set(ylabel="test loss")
axes[0].legend()
plt.show()
