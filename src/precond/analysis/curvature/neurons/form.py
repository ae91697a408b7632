r"""The Hessian of one neuron in the form H_e S H_eᵀ (Ye, Theorem 3), and what follows from it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from precond.analysis.curvature.condition import Conditioning, condition_number
from precond.analysis.curvature.errors import CurvatureError, Indefinite, Singular

_ROWS = 4096  # of H_eᵀ that enter a QR factorization at once


class LayerInputs:
    r"""H_e, whose columns are the extended inputs ĥ_jt = [1; h_jt] of a layer: sample j, position t, samples outermost.

    Args:
        H_e: (d, N·T); the row of ones comes first, and is missing for a layer without bias.
        bias: whether it is there.
    """

    def __init__(self, H_e: Tensor, bias: bool):
        self.H_e, self.bias = H_e, bias

    @cached_property
    def singular_values(self) -> Tensor:
        """The d largest singular values of H_e (fewer if there are fewer columns), descending, in float64."""
        R = self.H_e.new_zeros(0, len(self.H_e), dtype=torch.float64)
        for columns in self.H_e.split(_ROWS, dim=1):
            R = torch.linalg.qr(torch.cat([R, columns.T.double()]), mode="r").R
        return torch.linalg.svdvals(R)

    @property
    def threshold(self) -> float:
        """Up to which a singular value counts as zero: 16ε of the inputs' dtype times the largest."""
        found = self.singular_values
        return 16 * torch.finfo(self.H_e.dtype).eps * float(found[0]) if len(found) else 0.0

    @property
    def rank(self) -> int:
        """Number of singular values above the threshold."""
        return int((self.singular_values > self.threshold).sum())

    @property
    def kappa(self) -> float:
        """κ(H_e) = σ_max/σ_min; infinite where the rank is below d."""
        return self.kappa_positive if self.rank == len(self.H_e) else math.inf

    @property
    def kappa_positive(self) -> float:
        """σ_max over the smallest singular value above the threshold; NaN where all inputs are zero."""
        return float(self.singular_values[0] / self.singular_values[self.rank - 1]) if self.rank else math.nan

    def at(self, samples: Tensor, count: int) -> LayerInputs:
        """The inputs of some of ``count`` samples."""
        d = len(self.H_e)
        return LayerInputs(self.H_e.reshape(d, count, -1)[:, samples].reshape(d, -1), self.bias)


@dataclass(frozen=True)
class Signs:
    """Numbers of negative, null and positive eigenvalues of S; null up to 16ε times the largest magnitude."""

    negative: int
    null: int
    positive: int

    def __str__(self) -> str:
        return f"{self.negative} negative, {self.null} null, {self.positive} positive"


@dataclass(frozen=True, eq=False)
class NeuronHessian:
    r"""∇²_ŵ L = H_e S H_eᵀ of the weights ŵ = [b; w] of one neuron (Ye, eqs. 16–17).

    Attributes:
        layer: name of the layer.
        unit: number of the neuron: an output feature or channel.
        inputs: H_e with its singular values, the same object for all neurons that see the same inputs.
        s: S, with the weights 1/N of the mean in it: its diagonal, (N,), where the layer is applied once per sample, or one block of
            positions per sample, (N, T, T).

    References:
        Ye, Theorem 3. There S is diagonal; for a convolution or a sequence it is block-diagonal, because one sample's positions meet in
        its loss.
    """

    layer: str
    unit: int
    inputs: LayerInputs
    s: Tensor

    @property
    def H_e(self) -> Tensor:
        """The extended inputs, (d, N·T), in the order [b, w]."""
        return self.inputs.H_e

    def to_dense(self) -> Tensor:
        """H_e S H_eᵀ, (d, d), in the order [b, w]; the weight of a convolution in the order of ``weight[unit].flatten()``."""
        H_e = self.H_e.to(self.s.dtype)
        if self.s.ndim == 1:
            return (H_e * self.s) @ H_e.T
        samples = H_e.reshape(len(H_e), *self.s.shape[:2]).transpose(0, 1)
        return (samples @ self.s).transpose(0, 1).flatten(1) @ H_e.T

    @property
    def kappa_inputs(self) -> float:
        """κ(H_e), infinite where the inputs are linearly dependent."""
        return self.inputs.kappa

    @cached_property
    def curvatures(self) -> Tensor:
        """The eigenvalues of S, ascending, in float64; L''(a_j)/N where S is diagonal."""
        s = self.s.double()
        return (s if s.ndim == 1 else torch.linalg.eigvalsh(s)).flatten().sort().values

    @property
    def signs(self) -> Signs:
        """How many eigenvalues of S are negative, null and positive."""
        x = self.curvatures
        threshold = 16 * torch.finfo(self.s.dtype).eps * float(x.abs().max()) if len(x) else 0.0
        negative, positive = int((x < -threshold).sum()), int((x > threshold).sum())
        return Signs(negative, len(x) - negative - positive, positive)

    @property
    def definite(self) -> bool:
        """Whether all eigenvalues of S have one sign."""
        return self._refused_spread() is None

    @property
    def kappa_curvatures(self) -> float:
        """κ(S), largest over smallest magnitude.

        Raises:
            Indefinite: where S has eigenvalues of both signs.
            Singular: where it has null ones.
        """
        if (error := self._refused_spread()) is not None:
            raise error
        x = self.curvatures.abs()
        return float(x.max() / x.min())

    @property
    def bound(self) -> float:
        """κ(H_e)²κ(S), which κ(∇²_ŵ L) does not exceed where S is definite and H_e has full row rank (Ye, after eq. 20).

        Raises:
            Indefinite: where S has eigenvalues of both signs: the bound does not apply.
            Singular: where S has null ones (see :attr:`active`), or the inputs are linearly dependent.
        """
        if (error := self._refusal()) is not None:
            raise error
        return self.kappa_inputs**2 * self.kappa_curvatures

    @property
    def why(self) -> str | None:
        """Why the bound does not apply; None where it does."""
        return None if (error := self._refusal()) is None else str(error)

    @property
    def active(self) -> NeuronHessian:
        """The same matrix from the samples whose S is not exactly zero: behind a ReLU, those for which the neuron fires."""
        alive = (self.s != 0).reshape(len(self.s), -1).any(1)
        return NeuronHessian(self.layer, self.unit, self.inputs.at(alive, len(self.s)), self.s[alive])

    def conditioning(self, **options) -> Conditioning:
        """Ends of the spectrum, inertia and κ of :meth:`to_dense`, computed in float64 (:func:`condition_number`'s options)."""
        return condition_number(self.to_dense().double(), **options)

    def _refused_spread(self) -> CurvatureError | None:
        signs = self.signs
        where = f"neuron {self.unit} of layer {self.layer!r}"
        if signs.negative and signs.positive:
            return Indefinite(
                f"the bound κ(H_e)²κ(S) does not apply: S of {where} is indefinite ({signs}); read its signs and curvatures, or measure "
                "the spectrum of to_dense()"
            )
        if signs.null:
            return Singular(
                f"the bound κ(H_e)²κ(S) does not apply: S of {where} is singular to working precision ({signs}); .active leaves out "
                "the samples of zero curvature, float64 (objective.double()) tells small values from null ones"
            )
        return None

    def _refusal(self) -> CurvatureError | None:
        error = self._refused_spread()
        if error is None and self.inputs.rank < (d := len(self.H_e)):
            error = Singular(
                f"the bound κ(H_e)²κ(S) does not apply: the {d} extended inputs of layer {self.layer!r} have rank {self.inputs.rank}, so "
                "the Hessian is singular; read inputs.kappa_positive, or leave out constant and repeated features"
            )
        return error

    def __str__(self) -> str:
        rank, d = self.inputs.rank, len(self.H_e)
        x = self.curvatures
        lines = [
            f"neuron {self.unit} of layer {self.layer!r}: H_e S H_eᵀ of {d} weights, {self.H_e.shape[1]} columns",
            f"κ(H_e)  {self.kappa_inputs:.4g}"
            + ("" if rank == d else f" (rank {rank} of {d}, {self.inputs.kappa_positive:.4g} on it)"),
            f"S       {self.signs}" + (f", from {x[0]:.2e} to {x[-1]:.2e}" if len(x) else ""),
        ]
        if self.why is None:
            lines.append(f"κ(∇²) ≤ κ(H_e)²κ(S) = {self.bound:.4g}, κ(S) = {self.kappa_curvatures:.4g}")
        else:
            lines.append(str(self.why))
        return "\n".join(lines)
