"""
Which penalty acts where
========================

Weights of two kinds: the gradients of one kind are a hundred times as large as those of the other. The loss says nothing else about them, it
is noise. How fast does weight decay shrink them?

λ‖p‖² adds 2λp to the gradient, and Adam's M multiplies it: weights with small gradients are pulled hard, those with large ones hardly at all.
λ‖z‖² adds 2λp to the step, and all are pulled alike. The first is ``weight_decay`` of Adam, the second that of AdamW.
"""

import matplotlib.pyplot as plt
import torch

import precond

sizes = torch.tensor([[0.1], [10.0]]).expand(2, 200)  # 200 weights of each kind


def shrink(make, steps=6000):
    p = torch.nn.Parameter(torch.ones(2, 200))
    optimizer = make([p])
    draw = torch.Generator().manual_seed(0)
    means = []
    for _ in range(steps):
        p.grad = sizes * torch.randn(2, 200, generator=draw)
        optimizer.step()
        means.append(p.detach().mean(1))
    return torch.stack(means)


# %%
# One rate, or two
# ----------------
# ``weight_decay`` is 2λ. The dotted line is (1 − 2αλ)ᵗ, what decay alone would make of a weight.

lr, decay = 1e-3, 0.2
runs = {
    "λ‖p‖², in p: adam": shrink(lambda params: precond.adam(params, lr=lr, weight_decay=decay)),
    "λ‖z‖², in z: adamw": shrink(lambda params: precond.adamw(params, lr=lr, weight_decay=decay)),
}
figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True)
for axis, (name, means) in zip(axes, runs.items(), strict=True):
    for kind, label in enumerate(("gradients of size 0.1", "gradients of size 10")):
        axis.plot(means[:, kind], color=f"C{kind}", label=label)
        print(f"{name:20} {label:22} weights go from 1 to {means[-1, kind]:.2f}")
    axis.plot((1 - lr * decay) ** torch.arange(6000), ":", color="0.5", label="decay alone")
    axis.set(title=name, xlabel="step", ylim=(-0.05, 1.05))
axes[0].set_ylabel("mean weight")
axes[0].legend()
plt.show()
