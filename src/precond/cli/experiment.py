"""Searches, then trainings with every seed: one after the other, each kept when it is done."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from precond.cli.folder import Folder
from precond.cli.settings import Lr
from precond.report import Entry, Trial
from precond.report.results import LrFrom
from precond.workloads import Entrant, Outcome, Plan, Workload, train, write_atomically


@dataclass(frozen=True)
class Job:
    """One training: of which entrant, how, under which file name, what it is called, and whether it is part of a search."""

    entrant: Entrant
    plan: Plan
    slug: str
    title: str
    is_trial: bool = False


class Watcher(Protocol):
    """Sees trainings come and go."""

    def started(self, job: Job) -> None:
        """A training begins or goes on."""

    def stepped(self, step: int, loss: object) -> bool:
        """Steps done and the last loss; True asks to stop."""

    def finished(self, job: Job, outcome: Outcome, known: bool) -> None:
        """A training ended, in an earlier process if ``known``."""

    def chosen(self, entrant: Entrant, trials: tuple[Trial, ...], lr: float) -> None:
        """A search ended."""


@dataclass(frozen=True)
class Experiment:
    """Entrants on one workload.

    Attributes:
        workload: what is trained.
        entrants: in order.
        plan: what all trainings share; its learning rate and seed are replaced.
        seeds: of the final trainings.
        lr: a learning rate for all, ``"search"``, or ``"default"``; an entrant's own goes before.
        candidates: learning rates of a search.
        search_seed: of the trials.
        model_path: where the last trained model is saved; None: nowhere.
    """

    workload: Workload
    entrants: tuple[Entrant, ...]
    plan: Plan
    seeds: tuple[int, ...]
    lr: Lr
    candidates: tuple[float, ...]
    search_seed: int
    model_path: Path | None = None

    def lr_from(self, entrant: Entrant) -> LrFrom:
        """Where an entrant's learning rate comes from."""
        if entrant.lr is not None:
            return "own"
        if self.lr == "search":
            return "searched"
        return "default" if self.lr == "default" else "given"

    def amount(self) -> int:
        """Number of trainings."""
        searched = sum(self.lr_from(entrant) == "searched" for entrant in self.entrants)
        return searched * len(self.candidates) + len(self.entrants) * len(self.seeds)

    def run(self, folder: Folder, watcher: Watcher) -> tuple[Entry, ...]:
        """Train what is not trained yet.

        Raises:
            Interrupted, CheckpointError, WriteError, UserError: see :func:`precond.workloads.train` and :class:`Folder`.
        """
        found = []
        for index, entrant in enumerate(self.entrants):
            source, trials = self.lr_from(entrant), tuple[Trial, ...]()
            lr = self.lr if isinstance(self.lr, float) and source == "given" else None
            if source == "searched":
                trials = tuple(
                    Trial(job.plan.lr or math.nan, _final_loss(self._train(job, folder, watcher)))
                    for job in self._trials(index, entrant)
                )
                # Where every trial diverged, the smallest rate shows it.
                lr = min(trials, key=lambda t: (not math.isfinite(t.loss), t.loss if math.isfinite(t.loss) else t.lr)).lr
                watcher.chosen(entrant, trials, lr)
            runs = tuple(self._train(job, folder, watcher) for job in self._finals(index, entrant, lr))
            found.append(Entry(entrant.label, source, runs, trials))
        return tuple(found)

    def _trials(self, index: int, entrant: Entrant) -> Iterator[Job]:
        for i, lr in enumerate(self.candidates):
            plan = replace(self.plan, lr=lr, seed=self.search_seed)
            yield Job(entrant, plan, f"{index:02d}-{entrant.recipe}-search-{i:02d}", f"{entrant.label}, trial lr {lr:g}", True)

    def _finals(self, index: int, entrant: Entrant, lr: float | None) -> Iterator[Job]:
        for seed in self.seeds:
            plan = replace(self.plan, lr=lr, seed=seed)
            yield Job(entrant, plan, f"{index:02d}-{entrant.recipe}-seed-{seed}", f"{entrant.label}, seed {seed}")

    def _train(self, job: Job, folder: Folder, watcher: Watcher) -> Outcome:
        outcome = folder.outcome(job.slug)
        known = outcome is not None
        if outcome is None:
            watcher.started(job)
            checkpoint = folder.checkpoint(job.slug)
            outcome, model = train(self.workload, job.entrant, job.plan, checkpoint=checkpoint, watch=watcher.stepped)
            if self.model_path is not None and job.plan.seed in self.seeds:
                _save_model(self.model_path, model)
            folder.finish(job.slug, outcome)
        watcher.finished(job, outcome, known)
        return outcome


def _final_loss(outcome: Outcome) -> float:
    return math.nan if outcome.status == "diverged" else outcome.curve.validation_loss[-1]


def _save_model(path: Path, model: torch.nn.Module) -> None:
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    write_atomically(path, buffer.getvalue())
