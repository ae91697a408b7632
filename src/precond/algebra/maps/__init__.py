r"""Linear maps p = P z on tuples of tensors.

A preconditioner *is* such a map (Ye, eq. 4): gradients are pulled back by Pᵀ, steps are pushed forward by P,
and ``gram`` is M = P Pᵀ, what a preconditioned step applies to the gradient (eq. 5).
"""

from precond.algebra.maps.augmented import Augmented, augmented, parted
from precond.algebra.maps.base import Identity, LinearMap, Scaled, Transposed
from precond.algebra.maps.composite import BlockDiagonal, Product, block_diagonal, compose
from precond.algebra.maps.dense import Dense, GramOnly, Kronecker
from precond.algebra.maps.diagonal import Diagonal, InverseRoot
from precond.algebra.maps.layers import RowMatrix, Sliced, Standardizing
from precond.algebra.maps.layout import ExpertLayout, Layout, SideBySide
from precond.algebra.maps.rotation import CompactWY, Orthogonal, Rotation, completed
from precond.algebra.maps.secant import Secant
from precond.algebra.maps.spiked import Spiked
from precond.algebra.maps.symmetric import SymmetricKronecker, Tiled, Unrooted
from precond.algebra.maps.woodbury import Woodbury

__all__ = [
    "Augmented",
    "BlockDiagonal",
    "CompactWY",
    "Dense",
    "Diagonal",
    "ExpertLayout",
    "GramOnly",
    "Identity",
    "InverseRoot",
    "Kronecker",
    "Layout",
    "LinearMap",
    "Orthogonal",
    "Product",
    "Rotation",
    "RowMatrix",
    "Scaled",
    "Secant",
    "SideBySide",
    "Sliced",
    "Spiked",
    "Standardizing",
    "SymmetricKronecker",
    "Tiled",
    "Transposed",
    "Unrooted",
    "Woodbury",
    "augmented",
    "block_diagonal",
    "completed",
    "compose",
    "parted",
]
