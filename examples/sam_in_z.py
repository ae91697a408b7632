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
x_train, y_train, x_test, y_test = x[:200], y[:200], x[200:], y[200:]


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 10))


# %%
# Two calls
# ---------
# ``probe`` moves the parameters to p + δ and says that it wants another gradient. ``step`` finds them back, bit for bit.
# The optimizer was given the model, so the second pass sees the same dropout masks as the first.


def fit(regularizers, steps=300):
    model = make_model()
    optimizer = precond.adamw(model, lr=3e-3, regularizers=regularizers)
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
# The two spaces measure length differently, so each has its own range of ρ. One seed of one small problem: this shows how to
# compare, and settles nothing.

plain = fit([])
radii = {"p": [0.02, 0.05, 0.1, 0.2, 0.5], "z": [0.002, 0.005, 0.01, 0.02, 0.05]}
losses = {space: [fit([precond.SAM(rho, space=space)]) for rho in radii[space]] for space in radii}

figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True, layout="constrained")
for axis, space in zip(axes, radii, strict=True):
    axis.semilogx(radii[space], losses[space], "o-", label=f"SAM in {space}")
    axis.axhline(plain, color="gray", linestyle="--", label="none")
    axis.set(xlabel="ρ")
    axis.legend()
axes[0].set(ylabel="test loss")
plt.show()
