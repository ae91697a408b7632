"""Networks, data and dense float64 Hessians that the tests of curvature share.

Where a test here compares two float64 computations of one thing, its tolerance is rounding: 1e-16 an operation, some thousand operations in
a product, times the condition of what is solved with, 1e-12 to 1e-8 altogether; the order of sums differs between processors. Eigenvalues
by Lanczos have the tolerance that was asked for, and estimates a number of their own errors. Other tolerances say where they come from.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from precond.algebra import vec

CROSS = nn.CrossEntropyLoss()


def hessian_of(model: nn.Module, x: Tensor, y: Tensor, lam: float = 0.0, loss=CROSS) -> Tensor:
    """The Hessian of loss(model(x), y) + (lam/2)‖p‖² in all parameters, by torch's own function of a flat vector."""
    names, params = zip(*model.named_parameters(), strict=True)
    like = tuple(p.detach() for p in params)

    def f(flat):
        return loss(torch.func.functional_call(model, dict(zip(names, vec.unflatten(flat, like), strict=True)), (x,)), y)

    flat = vec.flatten(like)
    return torch.autograd.functional.hessian(f, flat) + lam * torch.eye(len(flat), dtype=flat.dtype)


def network(activation: type[nn.Module] = nn.Tanh, widths=(6, 5, 3), seed: int = 0) -> nn.Sequential:
    """A double-precision network of linear layers."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers[:-1]).double()


def examples(n: int = 40, inputs: int = 6, classes: int = 3, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Random inputs and labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, inputs, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, classes, (n,), generator=generator)


def penalized(model: nn.Module, lam: float):
    """Cross-entropy plus (λ/2)‖p‖², written by hand."""
    return lambda out, y: CROSS(out, y) + lam / 2 * sum(p.square().sum() for p in model.parameters())


def minimized(model: nn.Module, x: Tensor, y: Tensor, lam: float = 0.0, steps: int = 20) -> float:
    """Gradient norm after L-BFGS and Newton's method on the dense Hessian (with its absolute eigenvalues, null ones left out)."""
    loss = penalized(model, lam)
    opt = torch.optim.LBFGS(model.parameters(), max_iter=600, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

    def closure():
        opt.zero_grad()
        value = loss(model(x), y)
        value.backward()
        return value

    opt.step(closure)
    params = list(model.parameters())
    norm = float("inf")
    for _ in range(steps):
        g = vec.flatten(torch.autograd.grad(loss(model(x), y), params))
        norm = g.norm().item()
        if norm < 1e-11:
            break
        lam, V = torch.linalg.eigh(hessian_of(model, x, y, lam))
        keep = lam.abs() > 1e-10 * lam.abs().max()
        step = V[:, keep] @ ((V[:, keep].T @ g) / lam[keep].abs())
        with torch.no_grad():
            for p, d in zip(params, vec.unflatten(step, tuple(params)), strict=True):
                p -= d
    return norm
