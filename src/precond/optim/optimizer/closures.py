"""Gradients by closures: what they must do, and what they did to ``.grad``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from precond.optim.blocks import Leaf
from precond.optim.checking.arguments import number, shown

Gradients = list[Tensor | None]


class LossClosure:
    """A closure that returns the loss and calls no backward: what double backprop needs, and what every other method takes too.

    Args:
        f: makes a forward pass, and returns the loss, a tensor of one element with its graph.

    Example:
        >>> import torch, precond
        >>> p = torch.nn.Parameter(torch.tensor([1.0]))
        >>> opt = precond.PreconditionedGD([p], lr=0.1, preconditioner=precond.Fixed(),
        ...     regularizers=[precond.GradientNorm(0.5, method="exact")])
        >>> _ = opt.step(precond.LossClosure(lambda: (p**2).sum() / 2)); p.item()  # 1 − 0.1(1 + 0.5·2·1·1)
        0.800000011920929
    """

    def __init__(self, f: Callable[[], Tensor]):
        check_closure("LossClosure: f", f)
        self.f = f

    def __call__(self) -> Tensor:
        with torch.enable_grad():
            return self.f()


@dataclass
class Clearings:
    """How often an optimizer's gradients were cleared."""

    count: int = 0


def version_of(g: Tensor | None) -> tuple[Tensor | None, int]:
    """A gradient, and how often it was written."""
    return g, -1 if g is None else g._version


Made = Literal["none", "added", "anew"]
"""What a closure did to the gradients: nothing, it added to those that were there, or it made new ones."""


def loss_gradient(leaves: Sequence[Leaf], closure: Callable[[], Any], clearings: Clearings) -> tuple[Any, Made]:
    """Run a closure of either kind so that ``.grad`` holds the gradient; the loss, and what it did to the gradients.

    Raises:
        TypeError, ValueError: for a closure that returns something else than a scalar or None.
    """
    if isinstance(closure, LossClosure):
        for leaf in leaves:
            leaf.param.grad = None
        loss = closure()
        _check_loss(loss)
        loss.backward()
        return loss.detach(), "anew"
    cleared = clearings.count
    before = [leaf.param.grad for leaf in leaves]
    versions = [-1 if g is None else g._version for g in before]
    with torch.enable_grad():
        loss = closure()
    if loss is not None:
        _check_loss(loss)
    same = [leaf.param.grad is g for leaf, g in zip(leaves, before, strict=True)]
    if all(same) and versions == [-1 if g is None else g._version for g in before]:
        return loss, "none"
    added = clearings.count == cleared and any(s and g is not None for s, g in zip(same, before, strict=True))
    return loss, "added" if added else "anew"


def check_closure(what: str, closure: Any) -> None:
    """Raise TypeError for a closure that cannot be called."""
    if not callable(closure):
        loss = isinstance(closure, Tensor)
        remedy = "call loss.backward() and then step(), or give a function that returns the loss" if loss else "give a function"
        raise TypeError(f"{what} must be a function without arguments, got {shown(closure)}; {remedy}")


def check_scale(grad_scale: Any) -> None:
    """Raise TypeError or ValueError for a factor of losses that is none; on accelerators it is not read."""
    if callable(grad_scale):
        raise TypeError(
            f"probe: grad_scale must be a number, got {shown(grad_scale)}; probe takes no closure: give it to step, or write "
            "`while opt.probe(): loss_fn(...).backward()`"
        )
    if grad_scale is not None:
        scale = number("probe", "grad_scale", grad_scale)
        read = not isinstance(scale, Tensor) or scale.device.type == "cpu"
        if read and not (scale > 0 and math.isfinite(scale)):
            raise ValueError(f"probe: grad_scale must be a positive number, got {scale!r}; give scaler.get_scale()")


def check_repeatable(loss: Any, made: Made, regularizer: str) -> None:
    """Raise where a second call of a closure cannot give the second gradient of the same loss.

    Raises:
        TypeError: where it returned None.
        RuntimeError: where it called no backward, or added to the gradients of other batches.
    """
    if loss is None:
        raise TypeError(f"the closure returned None; it must return the loss, of which {regularizer} needs a second gradient")
    if made == "none":
        raise RuntimeError(
            f"the closure left every gradient as it was, and {regularizer} needs a second one: it must call zero_grad(), "
            "backward() and return the loss (a function that only returns the loss is passed as LossClosure(f))"
        )
    if made == "added":
        raise RuntimeError(
            "the closure must call zero_grad() before backward(): it added to gradients that were there, and the second gradient "
            f"that {regularizer} needs would be of its last batch alone. To accumulate, repeat all micro-batches: "
            "`while opt.probe(): ...` before step(), or precond.integrations (Lightning: SecondGradients() among the callbacks)"
        )


def exact_gradient(leaves: Sequence[Leaf], closure: Any, regularizer: str) -> tuple[Any, Gradients]:
    """The loss, and its gradient with a graph of its own, for Hessian–vector products; ``.grad`` gets a detached copy."""
    if not isinstance(closure, LossClosure):
        raise TypeError(
            f"{regularizer}(method='exact') differentiates twice and cannot use a closure that calls backward() itself: "
            "pass step(LossClosure(f)), f returning the loss"
        )
    loss = closure()
    _check_loss(loss)
    live = [leaf.param for leaf in leaves if leaf.param.requires_grad]
    found = dict(zip(live, torch.autograd.grad(loss, live, create_graph=True, allow_unused=True), strict=True))
    graph = [found.get(leaf.param) for leaf in leaves]
    for leaf, g in zip(leaves, graph, strict=True):
        leaf.param.grad = None if g is None else g.detach()
    return loss.detach(), graph


def _check_loss(loss: Any) -> None:
    if loss is None:
        raise TypeError("the closure returned None; it must return the loss")
    if isinstance(loss, Tensor) and loss.numel() != 1:
        raise ValueError(
            f"the closure returned a tensor of shape {tuple(loss.shape)}; it must return one number, e.g. loss.mean()"
        )
    if not isinstance(loss, Tensor | int | float):
        raise TypeError(f"the closure returned {type(loss).__name__}; it must return the loss, a tensor of one element")


def finite_loss(loss: Any) -> bool:
    """Whether a loss is neither inf nor NaN."""
    return math.isfinite(loss.item() if isinstance(loss, Tensor) else loss)
