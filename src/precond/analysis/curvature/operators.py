r"""Maps from matrices and SciPy's operators, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from precond.algebra.maps import Dense, LinearMap
from precond.algebra.vec import Vec, flatten, unflatten
from precond.analysis.curvature.symmetric import Block, SymmetricMap, apply_block, example_of, from_rows, length, to_rows

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator


class MatrixMap(SymmetricMap):
    """A symmetric matrix as a map on vectors of one tensor.

    Args:
        matrix: (n, n); its symmetry is checked where eigenvalues are computed.
    """

    def __init__(self, matrix: Tensor):
        self.matrix, self.like = matrix, (matrix.new_zeros(len(matrix)),)

    def mv(self, v: Vec) -> Vec:
        return (self.matrix @ v[0],)

    def mm(self, block: Block) -> Block:
        return (block[0] @ self.matrix.T,)

    def to_dense(self) -> Tensor:
        return self.matrix


class OperatorMap(SymmetricMap):
    """A symmetric SciPy ``LinearOperator`` (or sparse matrix) as a map on vectors of one tensor, computed by SciPy on the CPU.

    Args:
        operator: anything with ``shape``, ``dtype`` and ``@`` on NumPy vectors and matrices.
    """

    def __init__(self, operator: Any):
        self.operator = operator
        dtype = torch.float32 if operator.dtype is not None and str(operator.dtype) == "float32" else torch.float64
        self.like = (torch.zeros(operator.shape[0], dtype=dtype),)

    def mv(self, v: Vec) -> Vec:
        return (self._applied(v[0]),)

    def mm(self, block: Block) -> Block:
        return (self._applied(block[0].T).T,)

    def _applied(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.operator @ x.detach().cpu().numpy()).to(x)


def as_map(x: Any, caller: str = "as_map") -> LinearMap:
    """A map as it is; a square matrix (tensor, array, SciPy sparse matrix) or a SciPy ``LinearOperator`` as a map.

    Matrices and operators act on vectors of one tensor, of n entries.

    Args:
        x: what eigenvalues are asked of.
        caller: the name in error messages.

    Returns:
        A :class:`~precond.LinearMap`; a map is returned as it is.

    Raises:
        TypeError: for anything else.
        ValueError: for a matrix that is not square, or not real and floating-point.

    Example:
        >>> as_map(torch.tensor([[2.0, 1.0], [1.0, 2.0]])).mv((torch.tensor([1.0, 0.0]),))
        (tensor([2., 1.]),)
    """
    if isinstance(x, Dense) and x.like is None:
        return MatrixMap(_square(x.matrix, caller))
    if isinstance(x, LinearMap):
        return x
    if isinstance(x, Tensor):
        return MatrixMap(_square(x.detach(), caller))
    if hasattr(x, "shape") and hasattr(x, "dtype") and hasattr(x, "__matmul__"):
        if len(x.shape) != 2 or x.shape[0] != x.shape[1]:
            raise ValueError(f"{caller}: the matrix must be square, got shape {tuple(x.shape)}")
        if x.dtype is not None and str(x.dtype).startswith("complex"):
            raise ValueError(f"{caller}: the matrix must be real, got dtype {x.dtype}; give its real form")
        if hasattr(x, "__array__"):
            return MatrixMap(_square(torch.as_tensor(x), caller))
        return OperatorMap(x)
    raise TypeError(
        f"{caller}: map must be a LinearMap such as hessian(objective), a square matrix or a SciPy LinearOperator, "
        f"got {type(x).__name__}"
    )


def _square(matrix: Tensor, caller: str) -> Tensor:
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"{caller}: the matrix must be square, got shape {tuple(matrix.shape)}")
    if not matrix.is_floating_point():
        raise ValueError(f"{caller}: the matrix must be real and floating-point, got {matrix.dtype}; call .double() on it")
    return matrix


def to_scipy(map: LinearMap) -> LinearOperator:
    """A map as a SciPy ``LinearOperator`` on flattened vectors, for ``scipy.sparse.linalg``.

    Args:
        map: any map that states what it acts on, such as ``hessian(objective)`` or ``P``.

    Returns:
        An operator of shape (n, n) in the map's dtype, with ``matvec``, ``rmatvec`` and ``matmat``.

    Raises:
        ImportError: where SciPy is not installed.

    Example:
        >>> from scipy.sparse.linalg import eigsh
        >>> A = as_map(torch.diag(torch.arange(1.0, 6.0)).double())
        >>> eigsh(to_scipy(A), k=1, return_eigenvectors=False).round(6)
        array([5.])
    """
    try:
        from scipy.sparse.linalg import LinearOperator
    except ImportError as error:
        raise ImportError("to_scipy needs SciPy; pip install scipy") from error

    like = example_of(map, "to_scipy")
    flat = flatten(like)
    # NumPy has no bfloat16, and SciPy's solvers no float16.
    wide = torch.promote_types(flat.dtype, torch.float32)

    def vector(f: Callable[[Vec], Vec]) -> Callable[[Any], Any]:
        return lambda x: flatten(f(unflatten(torch.as_tensor(x.reshape(-1)).to(flat), like))).detach().to("cpu", wide).numpy()

    def matmat(X: Any) -> Any:
        return (
            to_rows(apply_block(map, from_rows(torch.as_tensor(X.T.copy()).to(flat), like))).T.detach().to("cpu", wide).numpy()
        )

    n, dtype = length(like), torch.zeros(0, dtype=wide).numpy().dtype
    return LinearOperator((n, n), matvec=vector(map.mv), rmatvec=vector(map.rmv), matmat=matmat, dtype=dtype)
