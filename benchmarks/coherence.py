"""``auto`` with and without steps as long as the coherence of their momentum.

    python benchmarks/coherence.py [--tasks "GPT, sums;LeNet, figures of Lissajous"] [--seeds 0,1] [--out coherence.json]

Trainings of 0.3 of the pool's steps. AdamW's rates are searched over a factor of 16, the others' are in the head of the table. A cell is the
steps to AdamW's lowest training loss / validation loss in units of AdamW's own, means over seeds, a miss counted with 1.2 of all steps.
Interrupted, it goes on from its file.
"""

from __future__ import annotations

from dataclasses import replace

from compared import Variant, main

import precond
from precond.lab.workloads.pool import members

TASKS = (
    "diabetes, raw",
    "deep autoencoder, curves",
    "LeNet, figures of Lissajous",
    "vision transformer, gratings",
    "GPT, sums",
    "Llama with normalized queries, melodies",
    "PINN, Helmholtz",
)

POLAR = precond.Polar(gain=2.0, momentum=precond.Momentum(0.9, "nesterov", dampening=0.9))

VARIANTS: dict[str, Variant] = {
    "full length": lambda m, lr: precond.auto(m, lr, choice=replace(precond.Auto(), polar=POLAR)),
    "auto": precond.auto,
}

if __name__ == "__main__":
    allowed = [m.name for half in ("development", "opened", "locked", "confirmation", "held-out") for m in members(half)]
    main(__doc__, TASKS, allowed, VARIANTS, (0.005, 0.01, 0.02, 0.04), "coherence.json")
