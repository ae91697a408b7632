"""Preconditioned optimization and regularization: choose the coordinates z, p = P z, in which a network is trained."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from precond import optim
from precond._moved import MOVED, install
from precond.algebra.maps import (
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
from precond.algebra.schedules import Schedule, TimesLr, Warmup
from precond.algebra.spaces import Bend, Cotangent, Instead, Prox, Space, Stage, Tangent
from precond.optim import SGD, Adam, AdamW, RMSprop
from precond.optim.averages import EMA, EMANesterov, PolynomialAverage, TailMean, WeightAverage
from precond.optim.blocks import Block, Leaf, State, is_decayed, is_hidden, is_matrix
from precond.optim.inputs import Observed, register_layer, routed
from precond.optim.inputs.hooks import unhook
from precond.optim.momentum import Momentum
from precond.optim.optimizer import PreconditionedGD
from precond.optim.optimizer.closures import LossClosure
from precond.optim.optimizer.parameters import decay_groups, role_groups
from precond.optim.optimizer.passes import frozen_statistics
from precond.optim.preconditioners import (
    BNP,
    KFAC,
    RMS,
    SOAP,
    AdaGrad,
    Auto,
    Composition,
    Fixed,
    Muon,
    Orthogonalized,
    OutputFactor,
    Polar,
    Preconditioner,
    RelativeRMS,
    Route,
    Schatten,
    Seen,
    Shampoo,
    Stacked,
    Whitening,
)
from precond.optim.recipes import RECIPES, adagrad, adam, adamw, auto, bnp, muon, rmsprop, sgd, shampoo, soap, whitening
from precond.optim.regularizers import (
    L1,
    L2,
    SAM,
    At,
    Cautious,
    CautiousL2,
    GradientNorm,
    Hyperball,
    RadialBrake,
    Regularizer,
    RowFloor,
)

if TYPE_CHECKING:
    from precond.analysis import (
        Conditioning,
        Diagnosis,
        MinMax,
        Monitor,
        Objective,
        Standardize,
        collapse_affine,
        condition_number,
        diagnose,
        eigenvalues,
        fold_batchnorm,
        gauss_newton,
        hessian,
        invariances,
        neuron_hessian,
        neuron_hessians,
        observed_rate,
        optimal_lr,
        preconditioner_of,
        predict,
        rate,
        spectral_density,
        unit_curvatures,
    )

__all__ = [
    "BNP",
    "EMA",
    "KFAC",
    "L1",
    "L2",
    "RECIPES",
    "RMS",
    "SAM",
    "SGD",
    "SOAP",
    "AdaGrad",
    "Adam",
    "AdamW",
    "At",
    "Auto",
    "Bend",
    "Block",
    "BlockDiagonal",
    "Cautious",
    "CautiousL2",
    "Composition",
    "Conditioning",
    "Cotangent",
    "Dense",
    "Diagnosis",
    "Diagonal",
    "EMANesterov",
    "Fixed",
    "GradientNorm",
    "GramOnly",
    "Hyperball",
    "Identity",
    "Instead",
    "InverseRoot",
    "Kronecker",
    "Leaf",
    "LinearMap",
    "LossClosure",
    "MinMax",
    "Momentum",
    "Monitor",
    "Muon",
    "Objective",
    "Observed",
    "Orthogonalized",
    "OutputFactor",
    "Polar",
    "PolynomialAverage",
    "PreconditionedGD",
    "Preconditioner",
    "Product",
    "Prox",
    "RMSprop",
    "RadialBrake",
    "Regularizer",
    "RelativeRMS",
    "Route",
    "RowFloor",
    "Scaled",
    "Schatten",
    "Schedule",
    "Seen",
    "Shampoo",
    "Space",
    "Stacked",
    "Stage",
    "Standardize",
    "Standardizing",
    "State",
    "TailMean",
    "Tangent",
    "TimesLr",
    "Warmup",
    "WeightAverage",
    "Whitening",
    "adagrad",
    "adam",
    "adamw",
    "auto",
    "bnp",
    "collapse_affine",
    "condition_number",
    "decay_groups",
    "diagnose",
    "eigenvalues",
    "fold_batchnorm",
    "frozen_statistics",
    "gauss_newton",
    "hessian",
    "invariances",
    "is_decayed",
    "is_hidden",
    "is_matrix",
    "muon",
    "neuron_hessian",
    "neuron_hessians",
    "observed_rate",
    "optim",
    "optimal_lr",
    "preconditioner_of",
    "predict",
    "rate",
    "register_layer",
    "rmsprop",
    "role_groups",
    "routed",
    "sgd",
    "shampoo",
    "soap",
    "spectral_density",
    "unhook",
    "unit_curvatures",
    "whitening",
]

install()


def __getattr__(name: str) -> Any:
    # What looks at a problem is loaded when it is asked for; a training loop asks for none of it.
    if name in MOVED:
        return import_module(MOVED[name])
    if name in __all__:
        return getattr(import_module("precond.analysis"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *MOVED})
