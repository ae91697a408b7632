"""Choices of P. A new one is one file here and one name below."""

from precond.preconditioners.adagrad import AdaGrad
from precond.preconditioners.auto import Auto
from precond.preconditioners.base import Part, Preconditioner, Seen
from precond.preconditioners.bnp import BNP
from precond.preconditioners.compose import Composition
from precond.preconditioners.fixed import Fixed
from precond.preconditioners.kfac import KFAC, OutputFactor
from precond.preconditioners.muon import Muon
from precond.preconditioners.orthogonalized import Orthogonalized
from precond.preconditioners.polar import Polar
from precond.preconditioners.rms import RMS
from precond.preconditioners.route import Route
from precond.preconditioners.schatten import Schatten
from precond.preconditioners.shampoo import Shampoo
from precond.preconditioners.soap import SOAP
from precond.preconditioners.split import Split
from precond.preconditioners.whitening import Whitening

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
    "Route",
    "Schatten",
    "Seen",
    "Shampoo",
    "Split",
    "Whitening",
]
