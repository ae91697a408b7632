"""Looking at a problem: curvature, predicted convergence, normalization, and what makes a training slow."""

from precond.analysis.convergence import observed_rate, optimal_lr, predict, rate
from precond.analysis.curvature import (
    Conditioning,
    Objective,
    condition_number,
    eigenvalues,
    gauss_newton,
    hessian,
    invariances,
    neuron_hessian,
    neuron_hessians,
    spectral_density,
    unit_curvatures,
)
from precond.analysis.diagnostics import Diagnosis, Monitor, diagnose, preconditioner_of
from precond.analysis.normalization import MinMax, Standardize, collapse_affine, fold_batchnorm

__all__ = [
    "Conditioning",
    "Diagnosis",
    "MinMax",
    "Monitor",
    "Objective",
    "Standardize",
    "collapse_affine",
    "condition_number",
    "diagnose",
    "eigenvalues",
    "fold_batchnorm",
    "gauss_newton",
    "hessian",
    "invariances",
    "neuron_hessian",
    "neuron_hessians",
    "observed_rate",
    "optimal_lr",
    "preconditioner_of",
    "predict",
    "rate",
    "spectral_density",
    "unit_curvatures",
]
