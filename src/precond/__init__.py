"""Preconditioned optimization and regularization: choose the coordinates z, p = P z, in which a network is trained."""

from precond.blocks import Block, Leaf, State, is_decayed, is_hidden, is_matrix
from precond.curvature import (
    Conditioning,
    Objective,
    condition_number,
    eigenvalues,
    gauss_newton,
    hessian,
    invariances,
    spectral_density,
)
from precond.diagnostics import Diagnosis, Monitor, diagnose, preconditioner_of
from precond.maps import (
    BlockDiagonal,
    Dense,
    Diagonal,
    GramOnly,
    Identity,
    InverseRoot,
    Kronecker,
    LinearMap,
    Product,
    Scaled,
    Standardizing,
)
from precond.momentum import Momentum
from precond.optimizer import PreconditionedGD
from precond.optimizer.parameters import decay_groups
from precond.optimizer.passes import frozen_statistics
from precond.optimizer.probing import LossClosure
from precond.preconditioners import BNP, RMS, SOAP, AdaGrad, Composition, Fixed, Muon, Preconditioner, Route, Seen, Whitening
from precond.recipes import RECIPES, adagrad, adam, adamw, bnp, muon, rmsprop, sgd, soap, whitening
from precond.regularizers import L1, L2, SAM, At, GradientNorm, Regularizer
from precond.schedules import Schedule, TimesLr, Warmup
from precond.spaces import Cotangent, Instead, Prox, Space, Tangent

__all__ = [
    "BNP",
    "L1",
    "L2",
    "RECIPES",
    "RMS",
    "SAM",
    "SOAP",
    "AdaGrad",
    "At",
    "Block",
    "BlockDiagonal",
    "Composition",
    "Conditioning",
    "Cotangent",
    "Dense",
    "Diagnosis",
    "Diagonal",
    "Fixed",
    "GradientNorm",
    "GramOnly",
    "Identity",
    "Instead",
    "InverseRoot",
    "Kronecker",
    "Leaf",
    "LinearMap",
    "LossClosure",
    "Momentum",
    "Monitor",
    "Muon",
    "Objective",
    "PreconditionedGD",
    "Preconditioner",
    "Product",
    "Prox",
    "Regularizer",
    "Route",
    "Scaled",
    "Schedule",
    "Seen",
    "Space",
    "Standardizing",
    "State",
    "Tangent",
    "TimesLr",
    "Warmup",
    "Whitening",
    "adagrad",
    "adam",
    "adamw",
    "bnp",
    "condition_number",
    "decay_groups",
    "diagnose",
    "eigenvalues",
    "frozen_statistics",
    "gauss_newton",
    "hessian",
    "invariances",
    "is_decayed",
    "is_hidden",
    "is_matrix",
    "muon",
    "preconditioner_of",
    "rmsprop",
    "sgd",
    "soap",
    "spectral_density",
    "whitening",
]
