"""Curvature of a mean loss: Hessian and Gauss–Newton matrix as maps, and the ends of their spectra."""

from precond.curvature.condition import Conditioning, Inertia, condition_number
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
from precond.curvature.neurons import LayerInputs, NeuronHessian, neuron_hessian, neuron_hessians
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
    "Indefinite",
    "Inertia",
    "LayerInputs",
    "NeuronHessian",
    "NoSecondDerivative",
    "NotResolved",
    "NotSymmetric",
    "Objective",
    "Shifted",
    "Singular",
    "Span",
    "Subspace",
    "as_map",
    "condition_number",
    "eigenvalues",
    "gauss_newton",
    "hessian",
    "in_float64",
    "neuron_hessian",
    "neuron_hessians",
    "to_scipy",
]
