r"""Square roots R of Gauss–Newton and Fisher matrices, G = RᵀR, and these matrices made of them."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from precond.algebra.vec import Vec
from precond.analysis.curvature.graph_cache import Batch
from precond.analysis.curvature.jacobian import Rectangular
from precond.analysis.curvature.objective import Evaluation, Objective
from precond.analysis.curvature.outputs import Fisher, checked, slopes
from precond.analysis.curvature.products import CurvatureMap, OutputJacobian, ThroughOutputs


class _Root(OutputJacobian):
    r"""R of a batch, R_rn = V_rnᵀJ_n with Λ_n = Σ_r V_rn V_rnᵀ; it maps to (r, N)."""

    def __init__(self, fisher: Fisher, samples: int, seed: int, caller: str, at: Evaluation, batch: Batch, params: Vec):
        super().__init__(at, batch, params)
        self._V = slopes(at, batch, fisher, samples, seed, caller)

    @property
    def image(self) -> Tensor:
        return self._V.new_zeros(self._V.shape[:2])

    def forward(self, v: Vec, batched: bool = False) -> Vec:
        (Jv,) = super().forward(v, batched)
        V = self._V.flatten(2)
        flat = Jv.reshape(*Jv.shape[: 1 + batched], -1)
        return (torch.einsum("rnc,knc->krn" if batched else "rnc,nc->rn", V, flat),)

    def backward(self, u: Vec, batched: bool = False) -> Vec:
        V = self._V.flatten(2)
        s = torch.einsum("rnc,krn->knc" if batched else "rnc,rn->nc", V, u[0])
        return super().backward((s.reshape(*s.shape[:batched], *self._V.shape[1:]),), batched)

    def product(self, v: Vec, batched: bool = False) -> Vec:
        """RᵀR v."""
        return self.backward(self.forward(v, batched), batched)


def gauss_newton_root(
    objective: Objective, fisher: Fisher = "exact", *, samples: int = 1, seed: int = 0, memory: float = 2**30
) -> Rectangular:
    r"""R with RᵀR = G, a map from parameters to one tensor (r, n_b) for each batch: of the n-th sample R_rn = V_rnᵀJ_n, ∇²_f = Σ_r V_r V_rᵀ.

    ``R.T @ R`` acts on parameters; ``R @ R.T`` is the Gram form, on r·N numbers in place of n parameters, with the same positive
    eigenvalues. ``R.to_dense()`` is what :class:`~precond.algebra.maps.Woodbury` takes. With ``"empirical"`` row n is √N ∇L_n, so that
    ``R @ R.T`` holds the inner products of the samples' gradients.

    Args:
        objective: a mean loss whose model returns one tensor (N, …), a sum over samples of convex functions of their outputs.
        fisher: what stands for ∇²_f: ``"exact"``, ``"sampled"`` or ``"empirical"``, see :func:`fisher`.
        samples: draws per sample of ``"sampled"``.
        seed: of the draws; the same in every product.
        memory: bytes of graphs to keep; what does not fit is forwarded again for every product.

    Raises:
        CoupledSamples: where the loss is no sum over samples.
        CurvatureError: where it is not convex in the outputs.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> R = gauss_newton_root(Objective(model, lambda out, y: 0.5 * (out - y).square().mean(), [(x, torch.zeros(2, 1))]))
        >>> (R @ R.T).to_dense()
        tensor([[0.5000, 0.0000],
                [0.0000, 2.0000]])

    References:
        Dangel, Tatzel & Hennig (2022), ViViT: curvature access through the generalized Gauss–Newton's low-rank structure.
    """
    checked("gauss_newton_root", fisher, samples)
    return Rectangular(objective, partial(_Root, fisher, samples, seed, "gauss_newton_root"), memory)


def fisher(
    objective: Objective, kind: Fisher = "empirical", *, samples: int = 1, seed: int = 0, memory: float = 2**30
) -> CurvatureMap:
    r"""F = Σ_n J_nᵀΛ_n J_n with Λ_n another matrix than ∇²_f of the loss in the outputs of sample n.

    ``"empirical"``: F = N Σ_n ∇L_n ∇L_nᵀ, L_n the share of sample n in the mean loss L = Σ_n L_n, N samples: the mean of the outer
    products of the samples' gradients with the labels of the data. No stand-in for the Hessian far from a minimum or where the model is wrong.
    ``"sampled"``: with labels that the model itself draws (nn.CrossEntropyLoss), or with random signs before a square root of
    ∇²_f (any other loss): of expectation G, :func:`gauss_newton`. ``"exact"``: the expectation, G.

    Args:
        objective: a mean loss whose model returns one tensor (N, …), a sum over samples of functions of their outputs.
        kind: as above.
        samples: draws per sample of ``"sampled"``.
        seed: of the draws; the same in every product.
        memory: bytes of graphs to keep; what does not fit is forwarded again for every product.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> torch.nn.init.zeros_(model.weight).numel()
        1
        >>> x = torch.tensor([[1.0], [2.0]])
        >>> half_square = lambda out, y: 0.5 * (out - y).square().mean()
        >>> fisher(Objective(model, half_square, [(x, 3 * x)])).to_dense()  # ∇L_n: −3/2 and −12/2
        tensor([[76.5000]])

    References:
        Kunstner, Balles & Hennig (2019), Limitations of the empirical Fisher approximation; Martens (2020), New insights and
        perspectives on the natural gradient method.
    """
    checked("fisher", kind, samples, name="kind")
    return ThroughOutputs(objective, partial(_Root, kind, samples, seed, "fisher"), memory)
