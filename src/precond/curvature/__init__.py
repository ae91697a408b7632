"""Curvature of a mean loss: Hessian and Gauss–Newton matrix as maps, and the ends of their spectra."""

from precond.curvature.condition import condition_number
from precond.curvature.conditioning import Conditioning, Inertia
from precond.curvature.density import SpectralDensity, spectral_density
from precond.curvature.eigen import Eigenvalues, eigenvalues
from precond.curvature.errors import (
    CoupledSamples,
    CurvatureError,
    Indefinite,
    NoSecondDerivative,
    NotResolved,
    NotSymmetric,
    Singular,
)
from precond.curvature.estimates import Estimate, diagonal, trace
from precond.curvature.invariances import Invariance, Invariances, invariances
from precond.curvature.jacobian import Rectangular, jacobian
from precond.curvature.kfac import ekfac, kfac
from precond.curvature.kronecker import InBasis, LayerwiseMap, Pair
from precond.curvature.neurons import LayerInputs, NeuronHessian, neuron_hessian, neuron_hessians, unit_curvatures
from precond.curvature.objective import Objective
from precond.curvature.operators import as_map, to_scipy
from precond.curvature.precision import in_float64
from precond.curvature.products import gauss_newton, hessian
from precond.curvature.residuals import Equation, Residuals, natural_steps
from precond.curvature.restricted import restricted
from precond.curvature.roots import fisher, gauss_newton_root
from precond.curvature.subspace import Span, Subspace
from precond.curvature.symmetric import Shifted

__all__ = [
    "Conditioning",
    "CoupledSamples",
    "CurvatureError",
    "Eigenvalues",
    "Equation",
    "Estimate",
    "InBasis",
    "Indefinite",
    "Inertia",
    "Invariance",
    "Invariances",
    "LayerInputs",
    "LayerwiseMap",
    "NeuronHessian",
    "NoSecondDerivative",
    "NotResolved",
    "NotSymmetric",
    "Objective",
    "Pair",
    "Rectangular",
    "Residuals",
    "Shifted",
    "Singular",
    "Span",
    "SpectralDensity",
    "Subspace",
    "as_map",
    "condition_number",
    "diagonal",
    "eigenvalues",
    "ekfac",
    "fisher",
    "gauss_newton",
    "gauss_newton_root",
    "hessian",
    "in_float64",
    "invariances",
    "jacobian",
    "kfac",
    "natural_steps",
    "neuron_hessian",
    "neuron_hessians",
    "restricted",
    "spectral_density",
    "to_scipy",
    "trace",
    "unit_curvatures",
]
