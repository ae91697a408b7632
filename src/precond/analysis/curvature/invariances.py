r"""Directions along which a loss does not change, found in a model, checked in numbers, and ready to be deflated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from precond.algebra import vec
from precond.algebra.maps import LinearMap
from precond.algebra.vec import Vec, flatten, unflatten
from precond.analysis.curvature.dataflow import layers
from precond.analysis.curvature.objective import Objective
from precond.analysis.curvature.products import hessian
from precond.analysis.curvature.subspace import Span, SparseSpan, Subspace
from precond.analysis.curvature.symmetries import Symmetry, symmetries

_MISSED = 0.01  # of a unit vector that P P⁺ is to leave as it is, rounding of an ill-conditioned P allowed for


@dataclass(frozen=True)
class Invariance:
    """Directions of one kind in one place, and what was measured of them.

    Attributes:
        kind: in words.
        where: names of the parameters.
        count: how many directions.
        slope: |Xᵀg| / (‖X‖‖g‖), which is 0 along an invariance.
        defect: ‖HX + (DX)ᵀg‖ / (‖H‖‖X‖), which is 0 too.
        curvature: ‖HX‖ / (‖H‖‖X‖), which is 0 where the loss is stationary as well.
        held: whether slope and defect are within the tolerance.

    Example:
        >>> import torch
        >>> from precond.analysis.curvature import Objective
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1)).double()
        >>> data = [(torch.randn(8, 2).double(), torch.randn(8, 1).double())]
        >>> first = invariances(Objective(model, torch.nn.MSELoss(), data)).found[0]
        >>> first.count, first.held, "0.weight" in first.where
        (3, True, True)
    """

    kind: str
    where: tuple[str, ...]
    count: int
    slope: float
    defect: float
    curvature: float
    held: bool

    def __str__(self) -> str:
        verdict = "holds" if self.held else "does not hold, left out"
        return (
            f"{self.count:5d}  {self.kind} ({', '.join(self.where)}): {verdict}; slope {self.slope:.0e}, defect {self.defect:.0e}, "
            f"curvature {self.curvature:.0e}"
        )


class Invariances(Subspace):
    """The span of all directions that hold; ``deflate=`` takes it as it is.

    Attributes:
        found: what the structure of the model suggests, with measurements.
        dim: dimension of the span of those that hold.
        directions: that span, None where none holds.
    """

    def __init__(self, found: tuple[Invariance, ...], directions: SparseSpan | None):
        self.found, self.directions = found, directions
        self.dim = 0 if directions is None else directions.dim

    @property
    def curvature(self) -> float:
        """Largest ‖HX‖/(‖H‖‖X‖) of those that hold: how far the directions are from being null vectors of H here."""
        return max((i.curvature for i in self.found if i.held), default=0.0)

    def removed(self, rows: Tensor) -> Tensor:
        return rows if self.directions is None else self.directions.removed(rows)

    def within(self, kept: Tensor) -> Subspace:
        return Invariances(self.found, None if self.directions is None else self.directions.within(kept))

    def through(self, P: LinearMap, like: Vec) -> Subspace:
        """The same directions in the coordinates z, p = P z: P⁻¹X, to be deflated from PᵀHP.

        Args:
            P: an invertible map.
            like: the parameters that it acts on, ``objective.params``.

        Raises:
            ValueError: where P does not reach one of them, P P⁺x ≠ x: its ``solve`` is a pseudo-inverse.
        """
        if self.directions is None:
            return self
        rows = self.directions.rows().to(flatten(like).dtype)
        moved = [P.solve(unflatten(x, like)) for x in rows]
        if any(float(torch.linalg.vector_norm(flatten(P.mv(z)) - x)) > _MISSED for z, x in zip(moved, rows, strict=True)):
            raise ValueError("Invariances.through: P is singular, and some directions are no P z; take H in p, or another P")
        return Span(moved)

    def __str__(self) -> str:
        if not self.found:
            return "no invariance found"
        return "\n".join([*(str(i) for i in self.found), f"{self.dim:5d}  in all, linearly independent"])


def invariances(objective: Objective, *, tol: float | None = None, seed: int = 0) -> Invariances:
    r"""Directions X(p) along which L(p) is constant because the model computes the same function.

    Found in the graph of the first batch's loss: positive scale of a unit before and after ReLU, leaky ReLU, pooling, dropout; scale and
    shift before batch, layer and group normalization (batch normalization in evaluation mode: against its γ and β); a shift of all
    classes before softmax; a bias against the next layer's bias where nothing stands between.

    None is trusted for its structure: L constant along X means Xᵀg = 0 and HX = −(DX)ᵀg, and both are measured, for all
    directions of one kind and place at once in a combination with random signs (‖Σ ±d_i‖² has the mean Σ‖d_i‖²), one by one where that fails. A
    penalty, a frozen bias or a weight that is used elsewhere are found out in this way. Where g = 0 they are null vectors of H; elsewhere
    deflating them leaves the Hessian across the orbits, and ``curvature`` says how much they are not null.

    Args:
        objective: the mean loss; only directions within ``objective.params`` are found.
        tol: of slope and defect; None: 1e-6 in float64, 1e-5 in float32. Batch normalization's scale holds up to its ε, and needs more.
        seed: of the random signs.

    Returns:
        A subspace for ``deflate=``, whose ``str`` lists what was found and measured.

    Raises:
        ValueError: for a tolerance outside of (0, 1).

    Example:
        >>> torch.set_default_dtype(torch.float64)
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> data = (torch.randn(8, 2), torch.randn(8, 1))
        >>> invariances(Objective(model, torch.nn.MSELoss(), data)).dim
        3
        >>> torch.set_default_dtype(torch.float32)

    References:
        Kunin et al. (2021), Neural mechanics, for the geometry; Dinh et al. (2017) for scale and sharpness.
    """
    if objective.params[0].dtype in (torch.float16, torch.bfloat16):
        objective = objective.double()
    params = objective.params
    if tol is None:
        tol = 1e-6 if params[0].dtype == torch.float64 else 1e-5
    if not 0 < tol < 1:
        raise ValueError(f"invariances: tol must lie in (0, 1), got {tol!r}")
    with objective.measuring(0):
        candidates = list(symmetries(layers(objective.evaluate(0).loss, params), params))
    check = _Check(objective, tol, seed)
    found: list[Invariance] = []
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for symmetry in candidates:
        for invariance, keep in check.verdicts(symmetry):
            found.append(Invariance(symmetry.kind, tuple(objective.names[i] for i in symmetry.params), *invariance))
            if found[-1].held:
                parts.append(_entries(symmetry, params, keep))
    if not parts:
        return Invariances(tuple(found), None)
    rows, columns, values, start = [], [], [], 0
    for row, column, value in parts:
        rows.append(row + start)
        columns.append(column)
        values.append(value)
        start += int(row.max()) + 1
    n = sum(p.numel() for p in params)
    return Invariances(tuple(found), SparseSpan(torch.cat(rows), torch.cat(columns), torch.cat(values), (start, n)))


def _entries(symmetry: Symmetry, params: Vec, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(row, column, value) of the kept fields, rows numbered from 0."""
    chosen = keep[symmetry.row]
    number = keep.long().cumsum(0) - 1
    with torch.no_grad():
        values = symmetry.values(params)
    return number[symmetry.row[chosen]], symmetry.column[chosen], values[chosen].detach()


class _Check:
    """Measures slope, defect and curvature along combinations of fields."""

    def __init__(self, objective: Objective, tol: float, seed: int):
        self.params, self.tol = vec.map_(Tensor.detach, objective.params), tol
        self.H, self.g = hessian(objective), flatten(objective.gradient())
        self.generator = torch.Generator().manual_seed(seed)
        x = self._random(self.g.numel())
        for _ in range(8):
            x = self._product(x / torch.linalg.vector_norm(x).clamp_min(torch.finfo(x.dtype).tiny))
        self.norm = float(torch.linalg.vector_norm(x))

    def verdicts(self, symmetry: Symmetry) -> Iterator[tuple[tuple[int, float, float, float, bool], Tensor]]:
        """Measurements (count, slope, defect, curvature, held) with the fields they are of: all at once, or those that hold and not."""
        k, device = symmetry.count, self.g.device
        everything = torch.ones(k, dtype=torch.bool, device=device)
        slope, defect, curvature = self.measured(symmetry, torch.sign(self._random(k)))
        if max(slope, defect) <= self.tol or k == 1:
            yield (k, slope, defect, curvature, max(slope, defect) <= self.tol), everything
            return
        each = torch.tensor([self.measured(symmetry, c) for c in torch.eye(k, dtype=self.g.dtype, device=device)])
        held = (each[:, :2].amax(1) <= self.tol).to(device)
        for keep, holds in ((held, True), (~held, False)):
            if bool(keep.any()):
                yield (int(keep.sum()), *each[keep.cpu()].amax(0).tolist(), holds), keep

    def measured(self, symmetry: Symmetry, c: Tensor) -> tuple[float, float, float]:
        """slope, defect and curvature along Σ c_i X_i."""
        leaves = tuple(p.detach().requires_grad_() for p in self.params)
        with torch.enable_grad():
            X = symmetry.combined(leaves, c)
            along = X @ self.g
        pulled = (
            flatten(torch.autograd.grad(along, leaves, allow_unused=True, materialize_grads=True))
            if along.requires_grad
            else torch.zeros_like(self.g)
        )
        X = X.detach()
        size = float(torch.linalg.vector_norm(X))
        if size == 0:
            return 0.0, 0.0, 0.0
        HX = self._product(X)
        tiny = torch.finfo(X.dtype).tiny
        # A gradient that is itself rounding has no direction: it is measured against what H makes of the parameters.
        scale = max(float(torch.linalg.vector_norm(self.g)), self.norm * 1e-6 * float(vec.norm(self.params)), tiny)
        slope = abs(float(along.detach())) / (size * scale)
        defect = float(torch.linalg.vector_norm(HX + pulled)) / (size * max(self.norm, tiny))
        return slope, defect, float(torch.linalg.vector_norm(HX)) / (size * max(self.norm, tiny))

    def _product(self, x: Tensor) -> Tensor:
        return flatten(self.H.mv(vec.unflatten(x, self.params)))

    def _random(self, k: int) -> Tensor:
        return torch.randn(k, generator=self.generator, dtype=torch.float64).to(self.g)
