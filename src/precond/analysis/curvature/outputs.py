r"""Square roots of the curvature of a loss in the outputs of the model: exact, sampled, or of the data's own gradients."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from precond.analysis.curvature.errors import CoupledSamples, CurvatureError
from precond.analysis.curvature.graph_cache import Batch
from precond.analysis.curvature.neurons.loss import LossCurvature, loss_curvature, loss_gradient
from precond.analysis.curvature.objective import Evaluation

Fisher = Literal["exact", "sampled", "empirical"]


def checked(caller: str, fisher: str, samples: int, kinds: tuple[str, ...] = get_args(Fisher), name: str = "fisher") -> None:
    """Refuse a kind of Fisher matrix that there is not, and a number of samples that is none."""
    if fisher not in kinds:
        raise ValueError(f"{caller}: {name} must be one of {', '.join(map(repr, kinds))}, got {fisher!r}")
    if not (isinstance(samples, int) and not isinstance(samples, bool) and samples >= 1):
        raise ValueError(f"{caller}: samples must be a whole number >= 1, got {samples!r}")


def slopes(at: Evaluation, batch: Batch, fisher: Fisher, samples: int, seed: int, caller: str) -> Tensor:
    r"""V, (r, N, …), with Λ_n = Σ_r V_rn V_rnᵀ the curvature of w_b ℓ_b in the outputs of sample n, or what stands for it.

    ``"exact"``: ∇²_f(w_b ℓ_b) itself. ``"sampled"``: of that expectation. ``"empirical"``: N ∇_f L_n ∇_f L_nᵀ, L_n sample n's share of the loss.

    Raises:
        CoupledSamples: where the loss of a sample depends on the outputs of another.
        CurvatureError: where Λ is not positive semidefinite, or too large to be formed.
    """
    f = at.outputs
    if not isinstance(f, Tensor):
        raise TypeError(f"{caller}: the model must return one tensor, got {type(f).__name__}; wrap it in a module that does")
    generator = torch.Generator().manual_seed(seed + batch.index)
    if fisher == "sampled" and _is_plain(at):
        return _labels(at, batch, samples, generator)
    if fisher == "empirical":
        g = loss_gradient(at, batch.weight, f.shape[0]) if f.ndim else None
        if g is not None:
            return (g * batch.total**0.5).view(1, *f.shape)
    found = loss_curvature(at, batch.weight, f.shape[0]) if f.ndim and fisher != "empirical" else None
    if found is None:
        raise CoupledSamples(
            f"{caller}: the loss of batch {batch.index} is no sum over samples of functions of their outputs, or these outputs are too many "
            f"({tuple(f.shape)}) for their second derivatives to be formed; give outputs (N, …) of N samples and a loss that adds over them, "
            "or fisher='sampled' with nn.CrossEntropyLoss"
        )
    V = _root(found, caller)
    if fisher == "sampled":
        signs = torch.randint(0, 2, (samples, *V.shape[:2]), generator=generator).to(V) * 2 - 1
        V = torch.einsum("srn,rnc->snc", signs, V) / samples**0.5
    return V.view(len(V), *f.shape)


def _root(found: LossCurvature, caller: str) -> Tensor:
    """V (r, N, C) of ∇²_f = Σ_r V_r V_rᵀ."""
    if found.factors is None:
        c = found.gradient.new_zeros(()) if found.c is None else found.c
        if bool((c < 0).any()):
            raise CurvatureError(f"{caller}: {_INDEFINITE}")
        return c.expand_as(found.gradient).sqrt().T[:, :, None] * torch.eye(
            found.gradient.shape[1], dtype=found.gradient.dtype, device=found.gradient.device
        ).unsqueeze(1)
    F, w = found.factors
    if w is None:
        return F
    if bool((w < 0).any()):
        raise CurvatureError(f"{caller}: {_INDEFINITE}")
    return F * w.sqrt()[:, :, None]


_INDEFINITE = "the loss is not convex in the outputs, so its curvature there has no square root; give a convex loss, or fisher='empirical'"


def _is_plain(at: Evaluation) -> bool:
    """Whether the loss is cross-entropy of classes, all of which count alike: labels can then be drawn."""
    loss = at.loss_fn
    if loss is not nn.functional.cross_entropy and not (
        isinstance(loss, nn.CrossEntropyLoss) and type(loss).forward is nn.CrossEntropyLoss.forward and loss.weight is None
    ):
        return False
    return isinstance(at.targets, Tensor) and not at.targets.is_floating_point()


def _labels(at: Evaluation, batch: Batch, samples: int, generator: torch.Generator) -> Tensor:
    """√c (p − e_y)/√samples for labels y drawn from the model's own p: of expectation c(diag p − ppᵀ), the curvature of cross-entropy."""
    f = at.outputs.detach()
    dim = 1 if f.ndim > 1 else 0
    p = f.softmax(dim).movedim(dim, -1)  # (…, C)
    ignored = getattr(at.loss_fn, "ignore_index", -100)
    counts = at.targets != ignored
    mean = getattr(at.loss_fn, "reduction", "mean") == "mean"
    c = batch.weight / (counts.sum() if mean else 1) / samples * counts
    flat = p.reshape(-1, p.shape[-1])
    y = torch.multinomial(flat.cpu(), samples, True, generator=generator).T.to(f.device)  # (samples, rows)
    V = flat - nn.functional.one_hot(y, p.shape[-1]).to(flat)
    return (V.view(samples, *p.shape) * c.to(f).sqrt().unsqueeze(-1)).movedim(-1, dim + 1)
