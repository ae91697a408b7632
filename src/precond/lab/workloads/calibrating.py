"""Cells of the calibration study: one setting under one optimizer, every remedy at fitted rates, beside what was predicted."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from precond.analysis.curvature import Objective
from precond.analysis.diagnostics.calibrated import STUCK, Row, summary
from precond.analysis.diagnostics.gains import QuadraticModel, predicted
from precond.analysis.diagnostics.rates import fitted
from precond.analysis.diagnostics.remedies import Candidate, base_of
from precond.analysis.diagnostics.short import Curve, compared, points, short_training
from precond.lab.workloads.calibration import BASES, Setting
from precond.lab.workloads.files import write_atomically

HORIZONS = (50, 150)
"""Steps of the trainings that predictions are made for."""

_AT = tuple(sorted({*range(0, 20, 2), *points(HORIZONS[-1], 30)}))
_START = {"gd": -4, "adam": -5}  # 10^(k/2): where the search of rates begins


@dataclass(frozen=True)
class Cell:
    """One remedy in one setting.

    Attributes:
        task, model, base, remedy: which.
        horizon: steps of the training.
        predicted: ratio of steps without and with the remedy, by the quadratic model.
        kappa: the same from κ alone, in the layer that gains most.
        measured: the same in trainings.
        rates: at which each was best, without and with.
        stuck: the share of hidden units that are saturated or dead before training.
    """

    task: str
    model: str
    base: str
    remedy: str
    horizon: int
    predicted: float
    kappa: float
    measured: float
    rates: tuple[float, float]
    stuck: float


def cells(setting: Setting, base: str, folder: Path, watch: Callable[[str], None] = lambda text: None) -> list[Cell]:
    """Of one setting under one optimizer; trainings come from the folder where they are done, predictions are made anew.

    Args:
        setting: task and architecture.
        base: a name among :data:`precond.lab.workloads.calibration.BASES`.
        folder: one file of curves for each setting and optimizer, written when all are done.
        watch: sees what is trained.
    """
    file = folder / f"{setting.name}, {base}.json".replace(" ", "-").replace(",", "")
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        objective = setting.make()
        quadratic, make = QuadraticModel.of(objective), BASES[base]
        own = base_of(None if make is None else make(objective.model, 1e-3), objective.model)
        candidates = [own.now()]
        if setting.dim != "none":
            candidates.append(own.standardized(setting.dim))  # type: ignore[arg-type]
        candidates += [own.within("bnp"), own.within("whitened")]
        curves = _read(file)
        for candidate in candidates if curves is None else ():
            watch(f"{setting.name}: {candidate.label}")
            curves = (curves or {}) | {candidate.name: fitted(partial(_train, objective, candidate), _START[base], HORIZONS)}
    assert curves is not None
    content = {name: [{"lr": c.lr, "losses": c.losses, "why": c.why} for c in many] for name, many in curves.items()}
    if not file.exists():
        write_atomically(file, json.dumps({"setting": setting.name, "base": base, "steps": _AT, "curves": content}))
    found = []
    for candidate in candidates[1:]:
        for horizon in HORIZONS:
            value, kappa = predicted(quadratic, own, candidate.name, horizon)
            measured, rates = compared(curves["now"], curves[candidate.name], horizon)
            found.append(
                Cell(setting.task, setting.model, base, candidate.name, horizon, value, kappa, measured, rates, quadratic.stuck)
            )
    return found


def _read(file: Path) -> dict[str, list[Curve]] | None:
    if not file.exists():
        return None
    found = json.loads(file.read_text())
    steps = tuple(found["steps"])
    return {name: [Curve(c["lr"], steps, tuple(c["losses"]), c["why"]) for c in many] for name, many in found["curves"].items()}


def _train(objective: Objective, candidate: Candidate, lr: float) -> Curve:
    prepared = objective if candidate.prepare is None else candidate.prepare(objective)
    return short_training(prepared, candidate.make, lr, HORIZONS[-1], at=_AT)


def rows(found: Sequence[Cell]) -> list[Row]:
    """The cells of the longest horizon whose prediction exists, as the fit takes them."""
    return [
        Row(c.task, f"{c.task}, {c.model}, {c.base}", c.remedy, c.stuck >= STUCK, c.predicted, c.measured)
        for c in found
        if c.horizon == HORIZONS[-1] and math.isfinite(c.predicted)
    ]


def summarized(found: Sequence[Cell]) -> dict[str, Any]:
    """What ``diagnose`` reads."""
    return summary(rows(found), HORIZONS[-1])
