"""Normalization as preconditioning: of the data, and folded into the layers next to it."""

from precond.analysis.normalization.batchnorm import collapse_affine, fold_batchnorm
from precond.analysis.normalization.data import MinMax, Normalization, Standardize
from precond.analysis.normalization.folding import ChannelPad
from precond.analysis.normalization.samples import SampleScaling

__all__ = ["ChannelPad", "MinMax", "Normalization", "SampleScaling", "Standardize", "collapse_affine", "fold_batchnorm"]
