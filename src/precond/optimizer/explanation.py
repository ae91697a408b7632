"""What acts on which parameter, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from precond.blocks import Leaf
from precond.engine.cells import Cell


@dataclass(frozen=True)
class Row:
    """One parameter: its name, shape, kind, what acts on it, and with which others jointly."""

    name: str
    shape: tuple[int, ...]
    kind: str
    preconditioner: str
    block: int


@dataclass(frozen=True)
class Explanation:
    """Rows of parameters; ``str`` makes a table of them."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        cells = [("parameter", "shape", "kind", "block", "preconditioner")]
        cells += [(r.name, "×".join(map(str, r.shape)) or "scalar", r.kind, str(r.block), r.preconditioner) for r in self.rows]
        widths = [max(len(row[i]) for row in cells) for i in range(5)]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def explain(leaves: Sequence[Leaf], cells: Sequence[Cell]) -> Explanation:
    """The table of an optimizer's leaves and cells."""
    acting = {i: (k, cell) for k, cell in enumerate(cells) for i in cell.index}
    rows = []
    for i, leaf in enumerate(leaves):
        k, cell = acting.get(i, (-1, None))
        what = "none (frozen)" if cell is None else repr(cell.preconditioner) if cell.handled else "identity"
        rows.append(Row(leaf.name, tuple(leaf.shape), leaf.kind, what, k))
    return Explanation(tuple(rows))
