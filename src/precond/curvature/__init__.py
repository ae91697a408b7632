"""Curvature of a mean loss: Hessian and Gauss–Newton matrix as maps, and the ends of their spectra."""

from precond.curvature.eigen import Eigenvalues, eigenvalues
from precond.curvature.errors import NoSecondDerivative, NotSymmetric
from precond.curvature.objective import Objective
from precond.curvature.products import gauss_newton, hessian
from precond.curvature.subspace import Span, Subspace

__all__ = [
    "Eigenvalues",
    "NoSecondDerivative",
    "NotSymmetric",
    "Objective",
    "Span",
    "Subspace",
    "eigenvalues",
    "gauss_newton",
    "hessian",
]
