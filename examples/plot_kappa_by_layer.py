"""
What each layer receives, and what a preconditioner makes of it
================================================================

The curvature of a layer is that of what it receives: κ of the mean of ĥĥᵀ, ĥ its inputs with a 1 in front. A long bar is a
layer that gradient descent learns slowly. The dots are the same layer in other coordinates, in which nothing about the
network changes: only the steps do.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import precond

images, labels = load_digits(return_X_y=True)
x, y = torch.as_tensor(images, dtype=torch.float32), torch.as_tensor(labels)
torch.manual_seed(0)
model = nn.Sequential(
    nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
)
optimizer = precond.adam(model, lr=1e-3)
for _ in range(100):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()

# %%
# Before and after
# ----------------
# ``diagnose`` measures each layer in several coordinates at once, in float64 and without forming squares.

found = precond.diagnose(precond.Objective(model, nn.functional.cross_entropy, [(x, y)]), optimizer)
layers = sorted(found.layers, key=lambda layer: int(layer.name))
columns = {"raw": "as it is", "optimizer": "in Adam's z", "bnp": "in BNP's z", "whitened": "in Whitening's z"}
figure, axis = plt.subplots(figsize=(7, 3.6))
for row, layer in enumerate(layers):
    kappas = [layer.spectra.kappa(column) for column in columns]
    axis.plot([min(kappas), max(kappas)], [row, row], color="0.5", linewidth=1, zorder=0)
    for color, (label, kappa) in enumerate(zip(columns.values(), kappas, strict=True)):
        axis.plot(kappa, row, "o", markersize=9, color=f"C{color}", label=label if row == 0 else None)
    print(f"layer {layer.name}: " + ", ".join(f"{k:.3g} {label}" for label, k in zip(columns.values(), kappas, strict=True)))
axis.set(xscale="log", xlabel="κ of what the layer receives", yticks=range(len(layers)))
axis.set_yticklabels([f"layer {row + 1}" for row in range(len(layers))])
axis.invert_yaxis()
axis.legend(loc="upper center", bbox_to_anchor=(0.5, 1.17), ncols=4)
plt.show()
