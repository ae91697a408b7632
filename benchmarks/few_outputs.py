"""``auto`` with and without the longer steps of layers of few outputs, on tasks of the pool that are not locked.

    python benchmarks/few_outputs.py [--tasks "PINN, Poisson;GRU, Lorenz series"] [--seeds 0,1] [--out few-outputs.json]

Trainings of 0.3 of the pool's steps. AdamW's rates are searched over a factor of 8, the others' are in the head of the table. A cell is the
steps to AdamW's lowest training loss / validation loss in units of AdamW's own, means over seeds, a miss counted with 1.2 of all steps.
Interrupted, it goes on from its file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compared import Variant, main

import precond
from precond.lab.workloads.pool import members

TASKS = (
    "PINN, Poisson", "PINN, Helmholtz", "PINN, Allen-Cahn", "PINN, Burgers", "GRU, Lorenz series", "LSTM, code", "diabetes, raw",
    "Friedman, raw scales", "conv net, digits", "GPT, code", "variational autoencoder, digits",
)  # fmt: skip


@dataclass(frozen=True)
class AsLong(precond.Polar):
    """Polar whose steps are as long whatever the number of outputs."""

    @staticmethod
    def spread(N: float, shape: Sequence[int]) -> float:
        return 1.0


VARIANTS: dict[str, Variant] = {
    "as long": lambda m, lr: precond.auto(m, lr, choice=precond.Auto(polar=AsLong(gain=2.0))),
    "auto": precond.auto,
}

if __name__ == "__main__":
    allowed = [m.name for half in ("development", "opened") for m in members(half)]
    main(__doc__, TASKS, allowed, VARIANTS, (0.01, 0.02, 0.04), "few-outputs.json")
