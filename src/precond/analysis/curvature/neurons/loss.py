r"""The curvature of the loss in the outputs of the model, sample by sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from precond.analysis.curvature.batches import moved
from precond.analysis.curvature.objective import Evaluation

T = TypeVar("T")
_ENTRIES = 2**27  # of ∇²_f of all samples, beyond which it is not formed


@dataclass(frozen=True)
class LossCurvature:
    r"""∇_f ℓ, and ∇²_f ℓ = Σ_r w_r F_r F_rᵀ + diag(c), of the samples of a batch at outputs f, seen as (N, C).

    Attributes:
        gradient: (N, C).
        factors: (F, w), F of shape (r, N, C), w (r, N) or None for ones; or None, where ∇²_f is diagonal.
        c: (N, C), or None for zeros.
    """

    gradient: Tensor
    factors: tuple[Tensor, Tensor | None] | None
    c: Tensor | None


def loss_curvature(at: Evaluation, weight: float, samples: int) -> LossCurvature | None:
    """Of w_b ℓ_b; None where outputs are no tensor (N, …), samples are coupled in the loss, or ∇²_f is too large to be formed."""
    found = _precisely(_curvature, at, weight, samples)
    if found is None:
        return None
    f = at.outputs
    to = lambda x: None if x is None else x.to(f.dtype)  # noqa: E731
    factors = found.factors and (found.factors[0].to(f.dtype), to(found.factors[1]))
    return LossCurvature(found.gradient.to(f.dtype), factors, to(found.c))


def loss_gradient(at: Evaluation, weight: float, samples: int) -> Tensor | None:
    """∇_f of w_b ℓ_b, (N, C); None as of :func:`loss_curvature`."""
    found = _precisely(_slope, at, weight, samples)
    return None if found is None else found[1].detach().to(at.outputs.dtype)


def _precisely(make: Callable[..., T | None], at: Evaluation, weight: float, samples: int) -> T | None:
    """``make`` in float64, where the loss allows it: 1 − p of a confident class p has no correct digit in float32."""
    f = at.outputs
    if not isinstance(f, Tensor) or f.ndim < 1 or f.shape[0] != samples or not f.is_floating_point():
        return None
    try:
        return make(at, f.detach().double(), moved(at.targets, f.device, torch.float64), weight)
    except (RuntimeError, TypeError):  # weights of the loss in float32, a device without float64
        return make(at, f.detach().clone(), at.targets, weight)


def _slope(
    at: Evaluation, outputs: Tensor, targets: Any, weight: float
) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor], Tensor, Tensor, Tensor] | None:
    """f (N, C), ∇_f, v ↦ ∇²_f v, a v, which samples are in a half, and ∇²_f of v there; None where that reaches the other half."""
    f = outputs.reshape(len(outputs), -1).requires_grad_()
    loss = at.loss_fn(f.reshape(outputs.shape), targets).reshape(()) * weight
    (g,) = torch.autograd.grad(loss, f, create_graph=True) if loss.requires_grad else (torch.zeros_like(f),)
    product = _product(g, f)
    generator = torch.Generator().manual_seed(0)
    v = (torch.rand(f.shape, generator=generator) + 0.5).to(f)
    inside = (torch.randperm(len(f), generator=generator) < len(f) // 2).to(f.device)
    half = product(v * inside[:, None])
    return None if bool(half[~inside].any()) else (f, g, product, v, inside, half)


def _curvature(at: Evaluation, outputs: Tensor, targets: Any, weight: float) -> LossCurvature | None:
    found = _slope(at, outputs, targets, weight)
    if found is None:
        return None
    f, g, product, v, inside, half = found
    N, C = f.shape
    Hv, rows = half + product(v * ~inside[:, None]), product(torch.ones_like(f))
    if bool((Hv - v * rows).abs().max() <= 8 * torch.finfo(f.dtype).eps * Hv.abs().max()):
        return LossCurvature(g.detach(), None, rows)
    if N * C * C > _ENTRIES:
        return None
    H = _rows(g, f)
    F = _cholesky(H)
    if F is not None:
        return LossCurvature(g.detach(), (F, None), None)
    w, V = torch.linalg.eigh(H)
    return LossCurvature(g.detach(), (V.permute(2, 0, 1).contiguous(), w.T.contiguous()), None)


def _product(g: Tensor, f: Tensor) -> Callable[[Tensor], Tensor]:
    def product(v: Tensor) -> Tensor:
        if not g.requires_grad:
            return torch.zeros_like(f)
        (found,) = torch.autograd.grad(g, f, v, retain_graph=True, allow_unused=True)
        return torch.zeros_like(f) if found is None else found

    return product


def _rows(g: Tensor, f: Tensor) -> Tensor:
    """∇²_f of each sample, (N, C, C)."""
    units = torch.eye(f.shape[1], dtype=f.dtype, device=f.device)
    try:
        (H,) = torch.autograd.grad(g, f, units[:, None].expand(-1, *f.shape), retain_graph=True, is_grads_batched=True)
    except (RuntimeError, NotImplementedError):  # an operation without a batching rule; if it is something else, it comes again
        H = torch.stack([torch.autograd.grad(g, f, unit.expand_as(f), retain_graph=True)[0] for unit in units])
    return H.transpose(0, 1)


def _cholesky(H: Tensor) -> Tensor | None:
    """F with H = Σ_r F_r F_rᵀ for positive semidefinite blocks, (rank, N, C), by diagonal pivoting; None where they are not."""
    (N, C), rest = H.shape[:2], H.permute(1, 2, 0).contiguous()
    diagonal = rest.diagonal().T  # a view, (C, N)
    # Rounding in H has the size of a derivative that does not cancel: confident samples have no larger entries than that.
    null = 4 * C * torch.finfo(H.dtype).eps * diagonal.max()
    samples = torch.arange(N, device=H.device)
    found = []
    for _ in range(C):
        pivot, at = diagonal.max(0)
        if not bool((pivot > null).any()):
            break
        column = rest[at, :, samples].T * torch.where(pivot > null, pivot, torch.inf).rsqrt()
        rest.addcmul_(column[:, None], column[None], value=-1)
        found.append(column.T)
    if not found or bool(rest.abs().max() > 16 * null):
        return None
    return torch.stack(found)
