"""How the outputs of a model change along a vector, in one forward pass with dual numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from precond.algebra.vec import Vec
from precond.analysis.curvature.isolation import substituted_tensors


class NoForwardDerivative(RuntimeError):
    """Dual numbers do not pass through a model as its backward pass does."""


class _AsBackward(TorchFunctionMode):
    """What is constant to the backward pass is so to the forward one, and what changes gradients on their way has no forward derivative."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._C._set_grad_enabled:  # torch.no_grad alone leaves tangents on
            torch._C._set_fwd_grad_enabled(*args)
        elif func is Tensor.register_hook:
            raise NoForwardDerivative("a hook on a tensor")
        elif func in _BILINEAR:
            return _bilinear(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


_BILINEAR = {F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}


def _bilinear(func: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any, **named: Any) -> Tensor:
    """f(x, W, b), bilinear in (x, W): where x is data, torch's own rule multiplies its tangent, zero, by W at the cost of another pass."""
    W, b = forward_ad.unpack_dual(weight), None if bias is None else forward_ad.unpack_dual(bias)
    if W.tangent is None or forward_ad.unpack_dual(x).tangent is not None:
        return func(x, weight, bias, *rest, **named)
    primal = func(x, W.primal, b and b.primal, *rest, **named)
    return forward_ad.make_dual(primal, func(x, W.tangent, b and b.tangent, *rest, **named))


def carried_along(call: Callable[[], Any], model: nn.Module, params: Sequence[Tensor], v: Vec) -> tuple[Any, Tensor]:
    """(f, J v) of the outputs f = ``call()`` of a model; f keeps its graph, so that it can be pulled back from, too.

    Args:
        call: forwards the model.
        model: which holds ``params``.
        params: the parameters that change along v.
        v: tensors of their shapes.

    Raises:
        Exception: of whatever kind, where an operation has no forward derivative.

    References:
        Baydin, Pearlmutter, Radul & Siskind (2018), Automatic differentiation in machine learning: a survey, section 3.1.
    """
    if any(p._backward_hooks for p in params):
        raise NoForwardDerivative("a hook on a parameter")
    with forward_ad.dual_level():
        duals = {id(p): forward_ad.make_dual(p, t) for p, t in zip(params, v, strict=True)}
        enabled = torch._C._is_fwd_grad_enabled()
        try:
            with _AsBackward(), substituted_tensors(model, duals):
                outputs = call()
        finally:
            torch._C._set_fwd_grad_enabled(enabled)
        found = forward_ad.unpack_dual(outputs)
    tangent = torch.zeros_like(found.primal) if found.tangent is None else found.tangent
    return found.primal, tangent.detach()
