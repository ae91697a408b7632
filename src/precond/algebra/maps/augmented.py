"""A layer's weight and bias as one matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from precond.algebra import vec
from precond.algebra.maps.base import LinearMap, Piecewise
from precond.algebra.vec import Scalar, Vec


def augmented(v: Vec, inputs_first: bool = False, stacked: bool = False) -> Tensor:
    """[W b], shape (out, rest + 1), of a weight and a bias; W as a matrix where it is alone; of a weight (in, out) its transpose.

    Of ``stacked`` ones, (k, …), the matrices are side by side too.

    Args:
        v: (weight, bias) or (weight,); the weight (out, …), the bias (out,).
        inputs_first: whether the weight is (in, out).
        stacked: whether each has one dimension more at the front, (k, …).

    Returns:
        The matrix, (out, rest + 1) with a bias and (out, rest) without, or (k, …) of these.

    Example:
        >>> import torch
        >>> augmented((torch.tensor([[1.0, 2.0]]), torch.tensor([9.0])))
        tensor([[1., 2., 9.]])
    """
    W = v[0].mT if inputs_first else v[0].reshape(*v[0].shape[: 1 + stacked], -1)
    return W if len(v) == 1 else torch.cat([W, v[1][..., None]], -1)


def parted(matrix: Tensor, like: Vec, inputs_first: bool = False) -> Vec:
    """The inverse of :func:`augmented`.

    Args:
        matrix: (out, rest + 1), (out, rest) of a weight alone, or (k, …) of these.
        like: example (weight, bias) or (weight,), whose shapes are taken.
        inputs_first: whether the weight is (in, out).

    Returns:
        (weight, bias), or (weight,).

    Example:
        >>> import torch
        >>> parted(torch.tensor([[1.0, 2.0, 9.0]]), (torch.zeros(1, 2), torch.zeros(1)))
        (tensor([[1., 2.]]), tensor([9.]))
    """
    W = matrix if len(like) == 1 else matrix[..., :-1]
    W = (W.mT if inputs_first else W).reshape(like[0].shape)
    return (W,) if len(like) == 1 else (W, matrix[..., -1])


class Augmented(Piecewise):
    """A map of matrices on a layer's weight and bias, the bias as the weight of an input that is always 1.

    Args:
        map: of one matrix, shape (out, rest + 1), or (out, rest) of a weight alone.
        like: example (weight, bias) or (weight,).
        inputs_first: whether the weight is (in, out).
        stacked: whether it acts on tensors (k, …), matrices (k, out, rest + 1).

    Example:
        >>> import torch, precond
        >>> layer = (torch.tensor([[1.0, 2.0]]), torch.tensor([1.0]))
        >>> swap = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])  # of the first input and the bias
        >>> Augmented(precond.Kronecker(None, swap), layer).mv((torch.tensor([[1.0, 2.0]]), torch.tensor([9.0])))
        (tensor([[9., 2.]]), tensor([1.]))
    """

    like: Vec

    def __init__(self, map: LinearMap, like: Vec, inputs_first: bool = False, stacked: bool = False):
        self.map, self.like, self.root, self.inputs_first, self.stacked = map, like, map.root, inputs_first, stacked

    def _each(self, method: str, v: Vec) -> Vec:
        (matrix,) = getattr(self.map, method)((augmented(v, self.inputs_first, self.stacked),))
        return parted(matrix, v, self.inputs_first)

    def conjugated(self, v: Vec, scales: Sequence[Scalar]) -> Vec:
        # From the left no column is mixed with another, and Q Λ = Λ Q.
        return vec.scale(v, scales) if self.map.from_left else super().conjugated(v, scales)

    def damped(self, delta: float) -> LinearMap:
        return self if delta == 0 else Augmented(self.map.damped(delta), self.like, self.inputs_first, self.stacked)

    @property
    def T(self) -> LinearMap:
        return Augmented(self.map.T, self.like, self.inputs_first, self.stacked)
