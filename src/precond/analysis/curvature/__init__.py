"""Curvature of a mean loss: Hessian and Gauss–Newton matrix as maps, and the ends of their spectra."""

from precond.analysis.curvature.condition import condition_number
from precond.analysis.curvature.conditioning import Conditioning, Inertia
from precond.analysis.curvature.density import SpectralDensity, spectral_density
from precond.analysis.curvature.eigen import Eigenvalues, eigenvalues
from precond.analysis.curvature.errors import (
    CoupledSamples,
    CurvatureError,
    Indefinite,
    NoSecondDerivative,
    NotResolved,
    NotSymmetric,
    Singular,
)
from precond.analysis.curvature.estimates import Estimate, diagonal, trace
from precond.analysis.curvature.invariances import Invariance, Invariances, invariances
from precond.analysis.curvature.jacobian import Rectangular, jacobian
from precond.analysis.curvature.kfac import ekfac, kfac
from precond.analysis.curvature.kronecker import InBasis, LayerwiseMap, Pair
from precond.analysis.curvature.neurons import LayerInputs, NeuronHessian, neuron_hessian, neuron_hessians, unit_curvatures
from precond.analysis.curvature.objective import Objective
from precond.analysis.curvature.operators import as_map, to_scipy
from precond.analysis.curvature.precision import in_float64
from precond.analysis.curvature.products import gauss_newton, hessian
from precond.analysis.curvature.residuals import Equation, Residuals, natural_steps
from precond.analysis.curvature.restricted import restricted
from precond.analysis.curvature.roots import fisher, gauss_newton_root
from precond.analysis.curvature.subspace import Span, Subspace
from precond.analysis.curvature.symmetric import Shifted

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
