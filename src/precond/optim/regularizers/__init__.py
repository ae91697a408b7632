"""Penalties in p and in z, and what bends a step. A new one is one file here and one name below."""

from precond.optim.regularizers.base import At, Regularizer
from precond.optim.regularizers.cautious import Cautious, CautiousL2
from precond.optim.regularizers.gradient_norm import GradientNorm
from precond.optim.regularizers.l1 import L1
from precond.optim.regularizers.l2 import L2
from precond.optim.regularizers.norms import Hyperball, RadialBrake, RowFloor
from precond.optim.regularizers.sam import SAM

__all__ = [
    "L1",
    "L2",
    "SAM",
    "At",
    "Cautious",
    "CautiousL2",
    "GradientNorm",
    "Hyperball",
    "RadialBrake",
    "Regularizer",
    "RowFloor",
]
