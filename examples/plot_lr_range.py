"""
A learning rate for each recipe
===============================

Each recipe has its own units. ``lr_range`` raises the rate until the loss blows up, then trains shortly from the start at
rates below. The lowest point of a curve, the large dot, is the rate to begin with. A wide valley forgives a wrong one.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import precond
from precond.analysis.diagnostics import lr_range

images, labels = load_digits(return_X_y=True)
x, y = torch.as_tensor(images, dtype=torch.float32) / 16, torch.as_tensor(labels)
batches = [(x[i : i + 64], y[i : i + 64]) for i in range(0, 1792, 64)]
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
objective = precond.Objective(model, nn.functional.cross_entropy, batches)

recipes = {
    "sgd": lambda model, lr: precond.sgd(model, lr=lr, momentum=0.9),
    "adamw": lambda model, lr: precond.adamw(model, lr=lr),
    "muon": lambda model, lr: precond.muon(model, lr=lr, adjust_lr_fn="match_rms_adamw"),
    "whitening": lambda model, lr: precond.whitening(model, lr=lr),
    "auto": lambda model, lr: precond.auto(model, lr=lr),
}
figure, axis = plt.subplots(figsize=(7, 4))
for color, (name, make) in enumerate(recipes.items()):
    found = lr_range(objective, make, steps=10, ramp_steps=30)
    stable = [curve for curve in found.curves if curve.final < 2.3]
    axis.loglog(
        [curve.lr for curve in stable], [curve.final for curve in stable], "o-", markersize=4, color=f"C{color}", label=name
    )
    axis.plot(found.lr, found.best.final, "o", markersize=10, color=f"C{color}")
    print(f"{name:10} lr {found.lr:.2g}: loss {found.best.final:.3f} after 10 steps")
axis.set(xlabel="learning rate", ylabel="loss after 10 steps")
axis.legend()
plt.show()
