"""
Input statistics for another optimizer
======================================

A weight that is multiplied by inputs h has the gradient G = E[δhᵀ], and every row of it is scaled and mixed by what h is like. K-FAC and
FOOF divide by the inputs' Gram matrix E[hhᵀ] for that reason, Newton-Muon does before it orthogonalizes. An optimizer sees gradients
alone; :func:`precond.optim.inputs.observe` hands it the inputs, over micro-batches, processes, checkpointed and compiled forwards.

Here they are fed to an optimizer that knows nothing of them, ``torch.optim.Muon``, by a hook before its step. Any other one will do:
where pytorch-optimizer is installed, its Muon is fed as well.
"""

from importlib.util import find_spec

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from precond.optim.inputs import observe

images, labels = load_digits(return_X_y=True)
x, y = torch.as_tensor(images, dtype=torch.float32), torch.as_tensor(labels)


# %%
# The hook
# --------
# Before each step G becomes G(E[hhᵀ] + λI)⁻¹, E a running mean and λ relative to its trace. ``rows`` shows a gradient as matrices
# (groups, rows, n) whose rows meet the n inputs, whatever kind of layer the weight belongs to; ``weight_of`` is its inverse.


def feed(optimizer, inputs, decay=0.95, damping=1e-2):
    """Divide gradients by what their weights' inputs are like, before each step of an optimizer."""
    grams = {}

    def before(*_):
        for weight, seen in inputs.collect().items():
            if weight.grad is None:
                continue
            gram = grams.setdefault(weight, seen.gram.clone()).lerp_(seen.gram, 1 - decay)
            damped = gram + damping * gram.diagonal(dim1=1, dim2=2).mean() * torch.eye(gram.shape[-1])
            weight.grad.copy_(seen.weight_of(torch.linalg.solve(seen.held(damped), seen.rows(weight.grad), left=False)))
        inputs.clear()

    return optimizer.register_step_pre_hook(before)


# %%
# A check
# -------
# Of least squares, whose Hessian by each row of W is E[hhᵀ], one such step of gradient descent is Newton's: it arrives.

torch.manual_seed(0)
layer, h, target = nn.Linear(4, 2, bias=False), torch.randn(50, 4) * torch.tensor([0.1, 1.0, 10.0, 100.0]), torch.randn(50, 2)
descent = torch.optim.SGD(layer.parameters(), lr=1.0)
feed(descent, inputs := observe(layer), damping=0.0)
(0.5 * (layer(h) - target).square().sum(1).mean()).backward()
descent.step()
inputs.close()
torch.testing.assert_close(layer.weight.data, torch.linalg.lstsq(h, target).solution.T, rtol=1e-3, atol=1e-4)


# %%
# In use
# ------
# Raw pixels, whose means and scales differ. Matrices go to the fed optimizer, vectors to Adam.


def torch_muon(weights):
    return torch.optim.Muon(weights, lr=0.02, weight_decay=0.0)


def other_muon(weights):
    from pytorch_optimizer import Muon

    return Muon([{"params": weights, "use_muon": True, "lr": 0.02}])


def fit(make, fed):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    matrices = make([p for p in model.parameters() if p.ndim == 2])
    vectors = torch.optim.Adam([p for p in model.parameters() if p.ndim == 1], lr=3e-3)
    inputs = observe(model)
    if fed:
        feed(matrices, inputs)
    losses, draw = [], torch.Generator().manual_seed(0)
    for _ in range(60):
        batch = torch.randint(len(x), (256,), generator=draw)
        loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        for optimizer in (matrices, vectors):
            optimizer.step()
            optimizer.zero_grad()
        inputs.clear()
        losses.append(loss.item())
    inputs.close()
    return losses


makers = {"torch.optim.Muon": torch_muon}
if find_spec("pytorch_optimizer"):
    makers["pytorch_optimizer.Muon"] = other_muon
for name, make in makers.items():
    for fed in (False, True):
        losses = fit(make, fed)
        label = f"{name}, fed" if fed else name
        print(f"{label:28} loss {sum(losses[-10:]) / 10:.4f}")
        plt.semilogy(losses, label=label)
plt.xlabel("step")
plt.ylabel("training loss")
plt.legend()
plt.show()
