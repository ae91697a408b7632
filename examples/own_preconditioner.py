"""
Your own preconditioner, in one file
====================================

A preconditioner is a frozen choice of how statistics become a linear map P. This one keeps one number per output row
instead of one per weight: a row of a weight matrix shares the mean of its squared gradients. Its state is as many times
smaller than Adam's second moment as a row is long.

With it comes everything else: momentum, schedules, checkpoints, penalties in p and in z, composition with other maps.
"""

from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import precond
from precond.algebra.maps import InverseRoot

# %%
# The preconditioner
# ------------------
# ``init`` makes the statistics of a block (here: of one tensor), ``observe`` folds a gradient in, ``map`` makes P.


@dataclass(frozen=True)
class RowRMS(precond.Preconditioner):
    """r ← ρr + (1−ρ)·mean of g² over each row; M = diag(1/(√r̂ + ε)), constant within a row."""

    decay: float = 0.99
    eps: float = 1e-8

    def init(self, block):
        return {"r": tuple(_row_means(z) for z in block.zeros())}

    def observe(self, state, seen):
        for r, g in zip(state["r"], seen.gradient, strict=True):
            r.lerp_(_row_means(g.square()), 1 - self.decay)

    def map(self, state):
        corrected = [r / (1 - self.decay**t) for r, t in zip(state["r"], state.steps, strict=True)]
        return InverseRoot(
            tuple((r.sqrt() + self.eps).expand_as(p) for r, p in zip(corrected, state.block.params, strict=True))
        )


def _row_means(t):
    """Means over all but the first dimension; a vector is one row."""
    return t.mean(dim=tuple(range(1, t.ndim)) if t.ndim > 1 else None, keepdim=True)


# %%
# A check against the dense matrix
# --------------------------------
# ``opt.map()`` is the P in force, aligned to the parameters. Plain gradient descent in z = P⁻¹p is the step.

torch.manual_seed(0)
layer = nn.Linear(3, 2).double()
optimizer = precond.PreconditionedGD(layer, lr=0.1, preconditioner=RowRMS())
layer(torch.randn(5, 3, dtype=torch.float64)).square().mean().backward()
before = torch.cat([p.detach().flatten() for p in layer.parameters()])
gradient = torch.cat([p.grad.flatten() for p in layer.parameters()])
optimizer.step()
after = torch.cat([p.detach().flatten() for p in layer.parameters()])
P = optimizer.map().to_dense()
torch.testing.assert_close(after, before - 0.1 * P @ P.T @ gradient)
print(P.diagonal())

# %%
# In use
# ------
# With Adam's momentum, and a penalty in its own z, which was written without knowing of it.

images, labels = load_digits(return_X_y=True)
x, y = torch.as_tensor(images, dtype=torch.float32), torch.as_tensor(labels)


def fit(preconditioner, regularizers=()):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = precond.PreconditionedGD(
        model, lr=3e-3, preconditioner=preconditioner, momentum=precond.Momentum(0.9), regularizers=regularizers
    )
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    numbers = sum(t.numel() for s in optimizer.state.values() for key, t in s.items() if key == "r")
    return losses, numbers


for name, result in {
    "RMS (Adam)": fit(precond.RMS()),
    "RowRMS": fit(RowRMS()),
    "RowRMS and λ‖z‖²": fit(RowRMS(), [precond.L2(1e-2, space="z")]),
}.items():
    losses, numbers = result
    print(f"{name:20} loss {losses[-1]:.4f}, {numbers} numbers of second moments")
    plt.semilogy(losses, label=name)
plt.xlabel("step")
plt.ylabel("training loss")
plt.legend()
plt.show()
