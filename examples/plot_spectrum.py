"""
The spectrum of the Hessian, in p and in z
==========================================

Gradient descent goes at the pace of the smallest eigenvalue over the largest. The Hessian in the coordinates z of a
preconditioner is PᵀHP. Each dot is an eigenvalue, the largest at the left, each spectrum divided by its largest. The flatter the
row of dots, the fewer steps.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_wine
from torch import nn

import precond

features, labels = load_wine(return_X_y=True)
x, y = torch.as_tensor(features), torch.as_tensor(labels)
x = x / x.std()  # one scale for all columns: they remain as unequal as they are


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(13, 8), nn.Tanh(), nn.Linear(8, 3)).double()


# %%
# P of an optimizer
# -----------------
# All recipes make 50 steps, the first of which are so short that the network hardly changes: the same H, another P each time. The
# Gauss–Newton matrix stands for H, being positive.

recipes = {
    "adam": lambda model: precond.adam(model, lr=1e-6),
    "bnp": lambda model: precond.bnp(model, lr=1e-6),
    "whitening": lambda model: precond.whitening(model, lr=1e-6, weight_decay=0.0),
    "soap": lambda model: precond.soap(model, lr=1e-6, weight_decay=0.0),
}


def spectrum(make):
    model = make_model()
    objective = precond.Objective(model, nn.functional.cross_entropy, [(x, y)])
    G = precond.gauss_newton(objective)
    if make is not None:
        optimizer = make(model)
        for _ in range(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        P = precond.preconditioner_of(optimizer, objective)
        G = P.T @ G @ P
    values = torch.linalg.eigvalsh(G.to_dense()).flip(0)
    return values / values[0]


figure, axis = plt.subplots(figsize=(7, 4))
for color, (name, make) in enumerate({"in p": None, **recipes}.items()):
    values = spectrum(make)
    label = name if make is None else f"in z of {name}"
    axis.semilogy(range(1, len(values) + 1), values.clamp_min(1e-16), ".-", color=f"C{color}", linewidth=0.7, label=label)
    print(f"{label:20} {int((values > 1e-6).sum())} of {len(values)} directions within a factor of 10⁶ of the steepest")
axis.set(xlabel="eigenvalue, by size", ylabel="eigenvalue / largest", ylim=(1e-14, 2))
axis.legend()
plt.show()
