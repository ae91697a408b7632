"""``auto`` with and without entrywise steps of layers that score the rows of a table of embeddings.

    python benchmarks/heads.py [--tasks "GPT, code;GPT, grammar"] [--seeds 0,1] [--out heads.json]

Trainings of 0.3 of the pool's steps. AdamW's rates are searched over a factor of 16, the others' are in the head of the table. A cell is the
steps to AdamW's lowest training loss / validation loss in units of AdamW's own, means over seeds, a miss counted with 1.2 of all steps.
Interrupted, it goes on from its file. Tasks without such a layer are stepped as before.
"""

from __future__ import annotations

from dataclasses import dataclass

from compared import Variant, main

import precond
from precond.lab.workloads.pool import members
from precond.optim.blocks import Leaf
from precond.optim.preconditioners import Preconditioner

TASKS = ("GPT, code", "GPT, English", "LSTM, code", "GPT, grammar", "next item, sessions")


@dataclass(frozen=True)
class AsOthers(precond.Auto):
    """Auto that steps such a layer as any other."""

    def _of_head(self, weight: Leaf, observed: bool) -> tuple[Preconditioner | None, str]:
        return self._of_layer([weight], observed)


VARIANTS: dict[str, Variant] = {
    "as others": lambda m, lr: precond.auto(m, lr, choice=AsOthers()),
    "auto": precond.auto,
}

if __name__ == "__main__":
    allowed = [m.name for half in ("development", "opened", "confirmation") for m in members(half)]
    main(__doc__, TASKS, allowed, VARIANTS, (0.01, 0.02, 0.04), "heads.json")
