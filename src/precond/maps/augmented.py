"""A layer's weight and bias as one matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from precond.maps.base import LinearMap, Piecewise
from precond.vec import Vec


def augmented(v: Vec) -> Tensor:
    """[W b], shape (out, rest + 1), of a weight and a bias; W as a matrix where it is alone."""
    W = v[0].reshape(v[0].shape[0], -1)
    return W if len(v) == 1 else torch.cat([W, v[1][:, None]], 1)


def parted(matrix: Tensor, like: Vec) -> Vec:
    """The inverse of :func:`augmented`."""
    if len(like) == 1:
        return (matrix.reshape(like[0].shape),)
    return matrix[:, :-1].reshape(like[0].shape), matrix[:, -1]


class Augmented(Piecewise):
    """A map of matrices on a layer's weight and bias, the bias as the weight of an input that is always 1.

    Args:
        map: of one matrix, shape (out, rest + 1), or (out, rest) of a weight alone.
        like: example (weight, bias) or (weight,).
    """

    like: Vec

    def __init__(self, map: LinearMap, like: Vec):
        self.map, self.like, self.root = map, like, map.root

    def _each(self, method: str, v: Vec) -> Vec:
        (matrix,) = getattr(self.map, method)((augmented(v),))
        return parted(matrix, v)

    def damped(self, delta: float) -> LinearMap:
        return self if delta == 0 else Augmented(self.map.damped(delta), self.like)

    @property
    def T(self) -> LinearMap:
        return Augmented(self.map.T, self.like)
