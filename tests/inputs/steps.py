"""A step of exact, undamped BNP, and what it must be."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from precond import BNP, PreconditionedGD


def stepped(model: nn.Module, forward: Callable[[], Tensor], preconditioner=None, groups=None) -> PreconditionedGD:
    """The optimizer after one step of exact, undamped BNP at lr = 0.1."""
    preconditioner = BNP(decay=0.0, damping=0.0) if preconditioner is None else preconditioner
    optimizer = PreconditionedGD(model if groups is None else groups, lr=0.1, preconditioner=preconditioner)
    forward().square().mean().backward()
    optimizer.step()
    return optimizer


def expected(weight: Tensor, bias: Tensor | None, inputs: Tensor) -> tuple[Tensor, ...]:
    """M g of eq. (25), from the gradients and all inputs of a weight."""
    if bias is None:
        return (weight.grad / inputs.square().mean(0),)
    dw = (weight.grad - bias.grad[:, None] * inputs.mean(0)) / inputs.var(0, correction=0)
    return dw, bias.grad - dw @ inputs.mean(0)


def check_step(params: list[Tensor], inputs: Tensor, before: list[Tensor]) -> None:
    weight, bias = (*params, None)[:2]
    for p, p0, step in zip(params, before, expected(weight, bias, inputs), strict=True):
        torch.testing.assert_close(p.detach(), p0 - 0.1 * step, rtol=1e-9, atol=1e-10)


def copies(*params: Tensor) -> list[Tensor]:
    return [p.detach().clone() for p in params]
