r"""Linear maps p = P z on tuples of tensors.

A preconditioner *is* such a map (Ye, eq. 4): gradients are pulled back by Pᵀ, steps are pushed forward by P,
and ``gram`` is M = P Pᵀ, what a preconditioned step applies to the gradient (eq. 5).
"""

from precond.maps.augmented import Augmented, augmented, parted
from precond.maps.base import Identity, LinearMap, Scaled, Transposed
from precond.maps.composite import BlockDiagonal, Product, block_diagonal, compose
from precond.maps.dense import Dense, GramOnly, Kronecker
from precond.maps.diagonal import Diagonal, InverseRoot
from precond.maps.layers import Layout, RowMatrix, SideBySide, Sliced, Stacked, Standardizing
from precond.maps.rotation import Orthogonal, Reflected, Rotation, completed
from precond.maps.secant import Secant
from precond.maps.spiked import Spiked
from precond.maps.symmetric import SymmetricKronecker, Tiled, Unrooted
from precond.maps.woodbury import Woodbury

__all__ = [
    "Augmented",
    "BlockDiagonal",
    "Dense",
    "Diagonal",
    "GramOnly",
    "Identity",
    "InverseRoot",
    "Kronecker",
    "Layout",
    "LinearMap",
    "Orthogonal",
    "Product",
    "Reflected",
    "Rotation",
    "RowMatrix",
    "Scaled",
    "Secant",
    "SideBySide",
    "Sliced",
    "Spiked",
    "Stacked",
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
