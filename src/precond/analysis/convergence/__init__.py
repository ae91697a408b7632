r"""How fast gradient descent converges: predicted from the spectrum, observed in a trace, and both side by side.

Near a minimum the error of (preconditioned) gradient descent shrinks by r = max(|1 − αλ_min|, |1 − αλ_max|) per step, λ the eigenvalues of
the Hessian, of PᵀHP with a preconditioner (Ye, Theorem 1). The loss, being quadratic there, shrinks by r².
"""

from precond.analysis.convergence.comparison import Comparison
from precond.analysis.convergence.observation import ObservedRate, observed_rate
from precond.analysis.convergence.prediction import Prediction, optimal_lr, predict, rate, steps

__all__ = ["Comparison", "ObservedRate", "Prediction", "observed_rate", "optimal_lr", "predict", "rate", "steps"]
