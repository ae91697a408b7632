"""A step of orthogonal iteration, Q ← qr(SQ), of symmetric positive matrices side by side (k, n, n), in place.

Which columns of SQ depend on those before is known once all are factored, and then they are factored again without these. SQ is kept beside
Q for that, or, where it is large, it is made in the memory of Q and comes back out of its factors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import isqrt

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from precond.optim.blocks.memory import PIECE
from precond.optim.preconditioners.eigenbases import at_hand, independent, least
from precond.optim.preconditioners.roots import kept


def follow(S: Tensor, Q: Tensor, may: Tensor | None = None, scratch: int = 0) -> Tensor | None:
    r"""Q ← qr(SQ) with its columns sorted by qᵀSq before, in place. R has a positive diagonal.

    Columns of SQ that depend on those before them are taken last and replaced by the completion (see
    :mod:`precond.optim.preconditioners.eigenbases`). Where S is zero or not finite, Q stays.

    Args:
        may: which of the k bases may move (k,); None: all.
        scratch: bytes that it may take on an accelerator, where they are enough for another Q; else a few times ``PIECE``, and more time.

    Returns:
        The order in which the columns of Q before were taken (k, n); None where none moved.
    """
    fits = at_hand(S) or Q.nbytes <= max(2 * PIECE, scratch)
    columns: _Columns = _Beside(S, Q) if fits else _Within(S, Q)
    moves = columns.moves if may is None else columns.moves & may[:, None]
    if at_hand(S):
        for matrix, fine in zip(S, columns.finite.tolist(), strict=True):
            if not fine[0]:
                kept(matrix)
        if not bool(moves.any()):
            return None
    sizes = columns.multiply(moves).masked_fill_(~moves, 1.0)  # the others are in their order
    largest = sizes.amax(-1, keepdim=True)
    sizes, order = torch.sort(sizes * (sizes > least(S.shape[-1], S.dtype) * largest), dim=-1, descending=True, stable=True)
    some = able = sizes > 0
    if at_hand(S) and bool(able.all()):
        columns.factor(order)
        some = independent(columns.A)
    if not (at_hand(S) and bool(some.all())):
        # What rounding leaves of a dependent column would decide about those after it: instead it is a small multiple of a unit vector.
        columns.factor(order, able, shift=largest)
        some = able & independent(columns.A)
        last = some.logical_not().to(torch.uint8).argsort(dim=-1, stable=True)
        order, some = order.gather(-1, last), some.gather(-1, last)
        columns.factor(order, some)
        columns.tau *= some[..., : columns.tau.shape[-1]]
    signs = torch.where(some, columns.A.diagonal(dim1=-2, dim2=-1), 1.0).sign_()
    torch.linalg.householder_product(columns.A, columns.tau, out=columns.A)
    columns.finish(signs)
    return order


class _Columns(ABC):
    """The columns of SQ, or where Q is not to move its own, and the reflections that they are factored into.

    Attributes:
        finite: whether qᵀSq are (k, 1).
        moves: whether S is not zero, too (k, 1).
        A: the memory of Q, in which columns are contiguous.
        tau: of those that were factored last (k, c).
    """

    finite: Tensor
    moves: Tensor
    tau: Tensor

    def __init__(self, S: Tensor, Q: Tensor):
        self.S, self.Q, self.A = S, Q, Q.mT

    @abstractmethod
    def multiply(self, moves: Tensor) -> Tensor:
        """Q ← SQ of those that move (k, 1); qᵀSq of each column (k, n)."""

    def factor(self, order: Tensor, some: Tensor | None = None, shift: Tensor | None = None) -> None:
        """Reflections of the QR decomposition into A and tau.

        Args:
            order: of the columns, as SQ has them.
            some: the others are set to zero. On a processor the last ones take no part.
            shift: sizes (k, 1), of which a share that counts as rounding is added to the diagonal.
        """
        self.put(order)
        if some is not None:
            self.A.mul_(some[..., None, :])
        if shift is not None:
            self.A.diagonal(dim1=-2, dim2=-1).add_(shift, alpha=1e-3 * least(self.A.shape[-1], self.A.dtype))
        A = self.A if some is None or not at_hand(self.S) else self.A[..., : int(some.sum(-1).amax())]
        self.tau = A.new_empty(len(A), A.shape[-1])
        torch.geqrf(A, out=(A, self.tau))

    @abstractmethod
    def put(self, order: Tensor) -> None:
        """The columns into A, in an order."""

    @abstractmethod
    def finish(self, signs: Tensor) -> None:
        """Q ← A·diag(signs), whose memory A has."""


class _Beside(_Columns):
    """They have memory of their own."""

    def __init__(self, S: Tensor, Q: Tensor):
        super().__init__(S, Q)
        self.rows = Q.mT @ S
        self.sizes = _dots(Q.mT, self.rows)
        trace = self.sizes.sum(-1, keepdim=True)
        self.finite = trace < torch.inf
        self.moves = (trace > 0) & self.finite

    def multiply(self, moves: Tensor) -> Tensor:
        torch.where(moves[..., None], self.rows, self.A, out=self.rows)
        return self.sizes

    def put(self, order: Tensor) -> None:
        torch.gather(self.rows, -2, order[..., None].expand(self.rows.shape), out=self.Q)

    def finish(self, signs: Tensor) -> None:
        torch.mul(self.A, signs[..., None, :], out=self.rows)
        self.Q.copy_(self.rows)


class _Within(_Columns):
    """They are in the memory of Q, and a piece of them is elsewhere for a while."""

    order: Tensor | None = None

    def __init__(self, S: Tensor, Q: Tensor):
        super().__init__(S, Q)
        k, n, _ = Q.shape
        self.pieces = _pieces(n, PIECE // (k * n * Q.element_size()))
        # Of what comes of S nothing is known before it is where Q was.
        limits, top = torch.finfo(S.dtype), S.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True)
        self.finite = (S.sum((-2, -1)) < torch.inf)[:, None] & (top < limits.max / n)
        self.moves = (top > limits.tiny * n) & self.finite

    def multiply(self, moves: Tensor) -> Tensor:
        _transpose(self.Q)
        return torch.cat([self._multiply_piece(self.Q[:, piece], moves) for piece in self.pieces], -1)

    def _multiply_piece(self, rows: Tensor, moves: Tensor) -> Tensor:
        Y = rows @ self.S
        sizes = _dots(rows, Y)
        torch.where(moves[..., None], Y, rows, out=rows)
        return sizes

    def put(self, order: Tensor) -> None:
        index = order
        if self.order is not None:
            self._restore()
            index = self.order.argsort(-1).gather(-1, order)
        for piece in self.pieces:
            columns = self.Q[..., piece]
            columns.copy_(columns.gather(-2, index[..., None].expand(columns.shape)))
        self.order, self.diagonal = order, self.A.diagonal(dim1=-2, dim2=-1).clone()
        self.norms = torch.linalg.vector_norm(self.A, dim=-2, keepdim=True).clamp_min_(torch.finfo(self.A.dtype).tiny)

    def _restore(self) -> None:
        """A as it was put, its last columns first: none depends on reflections after its own."""
        for piece in reversed(self.pieces):
            self._restore_piece(piece)
        self.A.diagonal(dim1=-2, dim2=-1).copy_(self.diagonal)

    def _restore_piece(self, piece: slice) -> None:
        R = self.A[..., piece].triu(-piece.start)
        sizes = self.norms[..., piece]
        Y = torch.ormqr(self.A[..., : piece.stop], self.tau[..., : piece.stop], R.div_(sizes))
        del R
        # An entry of rounding where zero was would decide the sign of a reflection.
        Y = hardshrink(Y, self.A.shape[-1] ** 0.5 * torch.finfo(Y.dtype).eps)
        torch.mul(Y, sizes, out=self.A[..., piece])

    def finish(self, signs: Tensor) -> None:
        self.A.mul_(signs[..., None, :])
        _transpose(self.Q)


def _dots(X: Tensor, Y: Tensor) -> Tensor:
    """Of rows with rows."""
    return (X[..., None, :] @ Y[..., :, None])[..., 0, 0]


def _pieces(n: int, width: int) -> list[slice]:
    """Of as many as n, as wide as is allowed."""
    width = max(1, width)
    return [slice(start, min(start + width, n)) for start in range(0, n, width)]


def _transpose(M: Tensor) -> None:
    """M ← Mᵀ of each (k, n, n), in place."""
    parts = _pieces(M.shape[-1], isqrt(2 * PIECE // (len(M) * M.element_size())))
    for i, a in enumerate(parts):
        for b in parts[i:]:
            _exchange(M[:, a, b], M[:, b, a])


def _exchange(upper: Tensor, lower: Tensor) -> None:
    """Blocks with each other's transposes, one on the diagonal with its own."""
    before = upper.mT.clone()
    if upper.storage_offset() != lower.storage_offset():
        upper.copy_(lower.mT)
    lower.copy_(before)
