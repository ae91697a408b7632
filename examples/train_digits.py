"""
A training loop on handwritten digits
=====================================

The loop is the one that every PyTorch user writes. What changes is the line that makes the optimizer.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import precond

torch.manual_seed(0)

# %%
# Data and model
# --------------
# 1,797 images of 8×8 pixels, which scikit-learn ships.

images, labels = load_digits(return_X_y=True)
data = TensorDataset(torch.as_tensor(images, dtype=torch.float32) / 16, torch.as_tensor(labels))
train, test = random_split(data, [1297, 500])
loader = DataLoader(train, batch_size=64, shuffle=True)
x_test, y_test = test[:]


def make_model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


# %%
# The loop
# --------
# ``decay_groups`` keeps weight decay away from biases. Schedulers see an ordinary optimizer. ``optimizer.last`` holds what a
# logger wants to know of the last step.


def fit(make_optimizer, epochs=10):
    model = make_model()
    optimizer = make_optimizer(model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs * len(loader))
    log = []
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            log.append((loss.item(), optimizer.last.preconditioned_grad_norm))
            scheduler.step()
    with torch.no_grad():
        accuracy = (model(x_test).argmax(1) == y_test).float().mean().item()
    return log, accuracy


choices = {
    "sgd": lambda model: precond.sgd(model, lr=0.1, momentum=0.9, nesterov=True),
    "rmsprop": lambda model: precond.rmsprop(model, lr=1e-3, regularizers=[precond.L1(1e-4)]),
    "adamw": lambda model: precond.adamw(precond.decay_groups(model, weight_decay=0.01), lr=3e-3, max_norm=1.0),
}
runs = {name: fit(make) for name, make in choices.items()}
for name, (_, accuracy) in runs.items():
    print(f"{name:8} test accuracy {accuracy:.3f}")

# %%
# What the steps looked like
# --------------------------
# ‖Pᵀg‖ is the length of the gradient in the coordinates in which descent is plain gradient descent.

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
for name, (log, _) in runs.items():
    left.semilogy([loss for loss, _ in log], label=name, alpha=0.7)
    right.semilogy([norm for _, norm in log], alpha=0.7)
left.set(xlabel="step", ylabel="training loss")
left.legend()
right.set(xlabel="step", ylabel="‖Pᵀg‖")
plt.show()
