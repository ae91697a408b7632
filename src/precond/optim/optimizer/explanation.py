"""What acts on which parameter, as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from torch import Tensor

from precond.algebra.maps import Identity
from precond.optim.blocks import Block, Leaf
from precond.optim.engine.cells import Cell
from precond.optim.preconditioners import Composition, Fixed, Preconditioner
from precond.optim.preconditioners.auto import NOT_OBSERVED
from precond.optim.preconditioners.split import Split

_TABLE = "is a table of embeddings (precond.optim.inputs.OneHot)"


@dataclass(frozen=True)
class Row:
    """One parameter: its name, shape, kind, what acts on it, with which others jointly, and why, where that was a choice."""

    name: str
    shape: tuple[int, ...]
    kind: str
    preconditioner: str
    block: int
    why: str = ""


@dataclass(frozen=True)
class Explanation:
    """Rows of parameters; ``str`` makes a table of them."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        cells = [("parameter", "shape", "kind", "block", "preconditioner", "why" if any(r.why for r in self.rows) else "")]
        cells += [
            (r.name, "×".join(map(str, r.shape)) or "scalar", r.kind, str(r.block), r.preconditioner, r.why) for r in self.rows
        ]
        widths = [max(len(row[i]) for row in cells) for i in range(6)]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def explain(
    leaves: Sequence[Leaf],
    cells: Sequence[Cell],
    of_groups: Sequence[Preconditioner],
    unobserved: Mapping[Tensor, str],
    absent: Set[Tensor] = frozenset(),
) -> Explanation:
    """The table of an optimizer's leaves and cells.

    Args:
        of_groups: what each parameter group asked for.
        unobserved: weights whose inputs are not observed, and why.
        absent: what had no gradient in the last step, while others of its layer had.
    """
    members = [(index, cell) for cell in cells for index in cell.members]
    acting = {i: (k, cell) for k, (index, cell) in enumerate(members) for i in index}
    live = sorted(acting)  # what is frozen took no part in the choice
    reasons = [P.reasons([leaves[i] for i in live]) for P in of_groups]
    why = {i: reasons[leaves[i].group].get(k, "") for k, i in enumerate(live)}
    rows = []
    for i, leaf in enumerate(leaves):
        k, cell = acting.get(i, (-1, None))
        what, reason = "none (no gradient)" if leaf.param in absent else "none (frozen)", why.get(i, "")
        if cell is not None:
            mine = cell.index.index(i) % len(cell.block.leaves)
            what = _acting(cell.preconditioner, cell.block, mine) if cell.handled else "identity"
            missing = unobserved.get(leaf.param) or (_TABLE if leaf.kind == "embedding" and not leaf.sites else "")
            asked = cell.preconditioner.requests or ((what == "identity" or _is_idle(cell)) and of_groups[leaf.group].requests)
            told = reason.endswith(NOT_OBSERVED)
            if missing and (told or asked):
                reason = f"{reason if told else NOT_OBSERVED}: {missing}"
            found = cell.preconditioner.findings(cell.state)
            member = cell.index.index(i) // len(cell.block.leaves)
            reason = ", ".join(x for x in (reason, *found[member : member + 1]) if x)
        rows.append(Row(leaf.name, tuple(leaf.shape), leaf.kind, what, k, reason))
    return Explanation(tuple(rows))


def _is_idle(cell: Cell) -> bool:
    """Whether the outer one of a composition leaves its leaves as they are."""
    return isinstance(cell.preconditioner, Composition) and _is_identity(cell.preconditioner.outer)


def _is_identity(x: Preconditioner) -> bool:
    return isinstance(x, Fixed) and isinstance(x.map_, Identity)


def _acting(x: Preconditioner, block: Block, i: int) -> str:
    """What acts on a leaf of a block: of compositions P₁ ∘ P₂ those that do anything to it, of parts its own."""
    if not x.handles(block) or _is_identity(x):
        return "identity"
    if isinstance(x, Composition):
        both = [_acting(part, block, i) for part in (x.outer, x.inner)]
        return " ∘ ".join(what for what in both if what != "identity") or "identity"
    if isinstance(x, Split):
        own = (part for part in x.parts if i in part.index)
        return next((_acting(part.preconditioner, block.subset(part.index), part.index.index(i)) for part in own), "identity")
    return _written(x)


def _written(x: Any) -> str:
    """As one would write it: with the settings that are not the defaults."""
    if not is_dataclass(x):
        return repr(x)
    own = ((f.name, getattr(x, f.name)) for f in fields(x) if getattr(x, f.name) != f.default)
    return f"{type(x).__name__}({', '.join(f'{name}={_written(value)}' for name, value in own)})"
