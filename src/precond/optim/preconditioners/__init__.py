"""Choices of P. A new one is one file here and one name below."""

from precond.optim.preconditioners.adagrad import AdaGrad
from precond.optim.preconditioners.auto import Auto
from precond.optim.preconditioners.base import Preconditioner
from precond.optim.preconditioners.bnp import BNP
from precond.optim.preconditioners.compose import Composition
from precond.optim.preconditioners.fixed import Fixed
from precond.optim.preconditioners.kfac import KFAC, OutputFactor
from precond.optim.preconditioners.muon import Muon
from precond.optim.preconditioners.orthogonalized import Orthogonalized
from precond.optim.preconditioners.parts import Part
from precond.optim.preconditioners.polar import Polar
from precond.optim.preconditioners.relative import RelativeRMS
from precond.optim.preconditioners.rms import RMS
from precond.optim.preconditioners.route import Route
from precond.optim.preconditioners.schatten import Schatten
from precond.optim.preconditioners.seen import Seen
from precond.optim.preconditioners.shampoo import Shampoo
from precond.optim.preconditioners.soap import SOAP
from precond.optim.preconditioners.split import Split
from precond.optim.preconditioners.stacked import Stacked
from precond.optim.preconditioners.whitening import Whitening

__all__ = [
    "BNP",
    "KFAC",
    "RMS",
    "SOAP",
    "AdaGrad",
    "Auto",
    "Composition",
    "Fixed",
    "Muon",
    "Orthogonalized",
    "OutputFactor",
    "Part",
    "Polar",
    "Preconditioner",
    "RelativeRMS",
    "Route",
    "Schatten",
    "Seen",
    "Shampoo",
    "Split",
    "Stacked",
    "Whitening",
]
