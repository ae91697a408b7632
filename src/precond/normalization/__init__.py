"""Normalization as preconditioning: of the data, and folded into the layers next to it."""

from precond.normalization.batchnorm import collapse_affine, fold_batchnorm
from precond.normalization.data import MinMax, Normalization, Standardize
from precond.normalization.folding import ChannelPad
from precond.normalization.samples import SampleScaling

__all__ = ["ChannelPad", "MinMax", "Normalization", "SampleScaling", "Standardize", "collapse_affine", "fold_batchnorm"]
