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
from precond.curvature.neurons import LayerInputs, NeuronHessian, neuron_hessian, neuron_hessians, unit_curvatures
from precond.curvature.objective import Objective
from precond.curvature.operators import as_map, to_scipy
from precond.curvature.precision import in_float64
from precond.curvature.products import gauss_newton, hessian
from precond.curvature.subspace import Span, Subspace
from precond.curvature.symmetric import Shifted

__all__ = [
    "Conditioning",
    "CoupledSamples",
    "CurvatureError",
    "Eigenvalues",
    "Estimate",
    "Indefinite",
    "Inertia",
    "Invariance",
    "Invariances",
    "LayerInputs",
    "NeuronHessian",
    "NoSecondDerivative",
    "NotResolved",
    "NotSymmetric",
    "Objective",
    "Shifted",
    "Singular",
    "Span",
    "SpectralDensity",
    "Subspace",
    "as_map",
    "condition_number",
    "diagonal",
    "eigenvalues",
    "gauss_newton",
    "hessian",
    "in_float64",
    "invariances",
    "neuron_hessian",
    "neuron_hessians",
    "spectral_density",
    "to_scipy",
    "trace",
    "unit_curvatures",
]
