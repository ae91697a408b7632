"""Searches, then trainings with every seed: one after the other, each kept when it is done."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Protocol

import torch

from precond.lab.cli.folder import Folder, damaged, file_name
from precond.lab.report import Entry, Target, TaskResults, default_target
from precond.lab.workloads import (
    CheckpointError,
    Contender,
    Curve,
    Entrant,
    Interrupted,
    LogUniform,
    Outcome,
    Plan,
    Task,
    Trial,
    WriteError,
    train,
    write_atomically,
)
from precond.lab.workloads.search import best

_SHORT = 5.0  # seconds of a training that is timed again


@dataclass(frozen=True)
class Job:
    """One training: of which contender, how, under which file name, what it is called, its metric, and whether it is part of a search."""

    contender: Contender
    plan: Plan
    slug: str
    title: str
    metric: str | None = None
    is_trial: bool = False


class Watcher(Protocol):
    """Sees trainings come and go."""

    def started(self, job: Job) -> None:
        """A training begins or goes on."""

    def stepped(self, step: int, loss: object) -> bool:
        """Steps done and the last loss; True asks to stop."""

    def finished(self, job: Job, outcome: Outcome, known: bool) -> None:
        """A training ended, in an earlier process if ``known``."""

    def skipped(self, trainings: int) -> None:
        """So many trainings fewer than there might have been."""

    def chosen(self, title: str, entrant: Entrant, trials: tuple[Trial, ...], lr: float) -> None:
        """A search ended."""


@dataclass(frozen=True)
class Study:
    """Tasks, one after the other.

    Attributes:
        tasks: in order; names differ.
        model_path: where the last trained model is saved; None: nowhere.
    """

    tasks: Sequence[Task]
    model_path: Path | None = None
    _warm: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    @property
    def amount(self) -> int:
        """Number of trainings, at most."""
        return sum(task.amount for task in self.tasks)

    def budget(self) -> list[str]:
        """One line for each task: who may spend how much; then who takes no part."""
        lines = []
        for task in self.tasks:
            searched = [c for c in task.contenders if c.lr_from == "searched"]
            trials, entrants = _counted(task.search.trials, "trial"), _counted(len(searched), "entrant")
            search = f"{trials} for each of {entrants} and then " if searched else ""
            lines.append(
                f"{self._prefix(task)}{search}{_counted(len(task.seeds), 'seed')} for each of "
                f"{len(task.contenders)}, {task.plan.steps:,} steps each"
            )
        return [*lines, *self.not_run()]

    def not_run(self) -> list[str]:
        """One line for each entrant that takes no part."""
        return [f"Not run: {one}." for one in dict.fromkeys(one for task in self.tasks for one in task.skipped)]

    def run(self, folder: Folder, watcher: Watcher) -> tuple[TaskResults, ...]:
        """Train what is not trained yet.

        Raises:
            Interrupted, CheckpointError, WriteError, UserError: see :func:`precond.lab.workloads.train` and :class:`Folder`.
        """
        return tuple(self._task(task, folder, watcher) for task in self.tasks)

    def _task(self, task: Task, folder: Folder, watcher: Watcher) -> TaskResults:
        entries: dict[int, Entry] = {}
        reported: list[tuple[Job, Outcome]] = []
        goal: float | None = None
        # The reference first: searches of the others may aim at its loss.
        for index, contender in sorted(task.numbered, key=lambda pair: pair[1].label != task.reference):
            slug = f"{folder_name(task)}/{index:02d}-{file_name(contender.entrant.slug)}"
            title = f"{self._prefix(task)}{contender.label}"
            trials = tuple[Trial, ...]()
            lr = contender.lr if isinstance(contender.lr, float) and contender.lr_from == "given" else None
            if contender.lr_from == "searched":
                trials, curves = self._search(task, contender, slug, title, goal, folder, watcher)
                lr = best(trials)
                watcher.skipped(task.search.most - len(trials))
                watcher.chosen(self._prefix(task), contender.entrant, trials, lr)
                if contender.label == task.reference and task.search.aim == "steps" and lr in curves:
                    goal = min(curves[lr].values())
                    # Chosen by its loss; its steps are there to be compared with.
                    trials = tuple(replace(t, steps=_first(curves.get(t.lr, {}), goal)) for t in trials)
            runs = []
            for seed in task.seeds:
                plan = replace(task.plan, lr=lr, seed=seed)
                job = Job(contender, plan, f"{slug}-seed-{seed}", f"{title}, seed {seed}", task.metric)
                runs.append(self._train(task, job, folder, watcher))
                reported.append((job, runs[-1]))
            space = contender.lr if isinstance(contender.lr, LogUniform) and trials else None
            bounds = None if space is None else (space.low, space.high)
            entries[index] = Entry(contender.label, contender.lr_from, tuple(runs), trials, bounds)
        if task.timings > 1:
            self._time(task, reported, folder, watcher)
        found = tuple(entries[index] for index, _ in task.numbered)
        target = default_target(found, task.reference, task.allowance, task.target_part)
        if task.target is not None:
            target = Target(task.target, target.part, "given with --target")
        reference = task.reference if any(entry.label == task.reference for entry in found) else None
        return TaskResults(
            task.name, task.metric, dict(task.facts), target, found, reference, task.search.judge, task.search.aim, task.family
        )

    def _search(
        self,
        task: Task,
        contender: Contender,
        slug: str,
        title: str,
        goal: float | None,
        folder: Folder,
        watcher: Watcher,
    ) -> tuple[tuple[Trial, ...], dict[float, dict[int, float]]]:
        """The trials, and by the rates of those that finished their losses by steps done."""
        by_training = task.search.judge == "training"
        curves: dict[float, dict[int, float]] = {}

        def tried(number: int, lr: float) -> Trial:
            plan = replace(
                task.plan, lr=lr, seed=task.search_seed, test=False,
                evaluations=task.search.evaluations, training_loss_on="search" if by_training else "train",
            )  # fmt: skip
            job = Job(contender, plan, f"{slug}-search-{number:02d}", f"{title}, trial lr {lr:g}", task.metric, True)
            outcome = self._train(task, job, folder, watcher)
            if outcome.status != "finished":
                return Trial(lr, math.nan)
            losses = outcome.curve.train_loss if by_training else outcome.curve.validation_loss
            curves[lr] = dict(zip(outcome.curve.step, losses, strict=True))
            return Trial(lr, losses[-1], _first(curves[lr], goal))

        assert isinstance(contender.lr, LogUniform)
        return task.search.run(contender.lr, tried), curves

    def _prefix(self, task: Task) -> str:
        return f"{task.name}: " if len(self.tasks) > 1 else ""

    def _train(self, task: Task, job: Job, folder: Folder, watcher: Watcher) -> Outcome:
        model_path, checkpoint = None if job.is_trial else self.model_path, folder.checkpoint(job.slug)
        # Without the model that it shall leave, a training is not done.
        outcome = folder.outcome(job.slug) if model_path is None or _holds_model(model_path) else None
        known = outcome is not None
        if outcome is not None:
            checkpoint.discard()  # of a process killed between the two files
        else:
            watcher.started(job)
            entrant = job.contender.entrant
            try:
                self._warm_up(job)
                outcome, model = train(
                    job.contender.workload(), entrant, job.plan, checkpoint=checkpoint, watch=watcher.stepped
                )
            except (Interrupted, CheckpointError, WriteError):
                raise
            except Exception as error:
                # An entrant that cannot do a task is a result. It is not kept: the same command tries again.
                reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
                outcome = Outcome(job.plan.seed, job.plan.lr or math.nan, Curve(), "failed", error=reason)
                checkpoint.discard()
            else:
                if model_path is not None:
                    _save_model(model_path, model)
                folder.finish(job.slug, outcome)
        watcher.finished(job, outcome, known)
        return outcome

    def _time(self, task: Task, reported: Sequence[tuple[Job, Outcome]], folder: Folder, watcher: Watcher) -> None:
        """Seconds of trainings that take less than five: medians of several rounds through all of them.

        The speed of a machine changes from minute to minute, by more than such trainings differ. One after the other, each would be timed
        in another minute.
        """
        short = [(job, run) for job, run in reported if run.status == "finished" and run.curve.cpu_seconds[-1] < _SHORT]
        if all(run.rounds == task.timings for _, run in short):
            return
        clocks = ("seconds", "cpu_seconds")
        found: dict[str, list[Curve]] = {job.slug: [] for job, _ in short}
        for number in range(task.timings):
            for job, _ in sorted(short, key=lambda pair: pair[0].plan.seed):
                watcher.started(replace(job, title=f"{job.title}, timed {number + 1} of {task.timings}"))
                self._warm_up(job)
                outcome, _ = train(job.contender.workload(), job.contender.entrant, job.plan, watch=watcher.stepped)
                found[job.slug].append(outcome.curve)
        for job, run in short:
            for name in clocks:
                columns = zip(*(getattr(curve, name) for curve in found[job.slug]), strict=True)
                setattr(run.curve, name, [median(of_row) for of_row in columns])
            run.rounds = task.timings
            folder.finish(job.slug, run)

    def _warm_up(self, job: Job) -> None:
        """Two steps that nobody counts: an optimizer's first ones in a process load libraries and build kernels."""
        if job.contender.label not in self._warm:
            plan = replace(job.plan, steps=2, warmup=0, evaluations=1, test=False)
            train(job.contender.workload(), job.contender.entrant, plan)
            self._warm.add(job.contender.label)


def _counted(n: int, what: str) -> str:
    return f"{n} {what}{'s' if n > 1 else ''}"


def _first(losses: dict[int, float], goal: float | None) -> int | None:
    """Steps to the first loss that meets the goal."""
    return None if goal is None else next((step for step, loss in losses.items() if loss <= goal), None)


def folder_name(task: Task) -> str:
    """Where the trainings of a task are."""
    return file_name(task.name)


def _holds_model(path: Path) -> bool:
    """Whether there is a model.

    Raises:
        UserError: where the file is damaged.
    """
    try:
        torch.load(path, weights_only=True)
    except FileNotFoundError:
        return False
    except Exception as error:
        raise damaged(path, error) from error
    return True


def _save_model(path: Path, model: torch.nn.Module) -> None:
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    write_atomically(path, buffer.getvalue())
