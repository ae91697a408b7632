"""Curvature of a mean loss: Hessians as maps, their eigenvalues and conditioning, single neurons."""

from precond.curvature.objective import Objective
from precond.curvature.products import gauss_newton, hessian

__all__ = ["Objective", "gauss_newton", "hessian"]
