"""What one sees while it trains."""

from __future__ import annotations

import math
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from precond.lab.cli.stopping import Stop
from precond.lab.cli.study import Job
from precond.lab.report import numbers
from precond.lab.workloads import Entrant, Outcome, Trial

_REFRESH = 0.1


class Live:
    """A line per finished training, and on a terminal bars below them.

    Nothing is drawn more often than every 0.1 s, from the training thread itself and outside the timed part of a step.

    Args:
        console: where to.
        amount: number of trainings.
        stop: asked after each step.
    """

    def __init__(self, console: Console, amount: int, stop: Stop) -> None:
        self._console, self._amount, self._stop = console, amount, stop
        self.done = self.known = 0
        self._searched = False
        self.current: Job | None = None
        self._drawn_at = 0.0
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            auto_refresh=False,
            transient=True,
            disable=not console.is_terminal,
        )
        self._all = self._progress.add_task("trainings", total=amount, note="")
        self._one = self._progress.add_task("", total=None, note="", visible=False)

    def __enter__(self) -> Live:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def started(self, job: Job) -> None:
        self.current = job
        self._progress.reset(self._one, total=job.plan.steps, description=job.title, note="", visible=True)

    def stepped(self, step: int, loss: Any) -> bool:
        now = time.monotonic()
        if self._console.is_terminal and now - self._drawn_at >= _REFRESH:
            self._drawn_at = now
            self._progress.update(self._one, completed=step, note=f"loss {numbers.short(float(loss))}")
            self._progress.refresh()
        return self._stop.signal is not None

    def finished(self, job: Job, outcome: Outcome, known: bool) -> None:
        self.done += 1
        self.known += known
        self.current = None
        self._progress.update(self._all, completed=self.done)
        if known:
            return
        if job.is_trial:
            self._searched = True
        else:
            self._say(f"{job.title}: {self._result(job, outcome)}")

    def skipped(self, trainings: int) -> None:
        self._amount -= trainings
        self._progress.update(self._all, total=self._amount)

    def chosen(self, title: str, entrant: Entrant, trials: tuple[Trial, ...], lr: float) -> None:
        if self._searched and not any(math.isfinite(trial.loss) for trial in trials):
            self._say(f"{title}{entrant.label}: none of {len(trials)} trials finished")
        elif self._searched:
            self._say(f"{title}{entrant.label}: lr {lr:g} is best of {len(trials)} trials")
        self._searched = False

    def _say(self, line: str) -> None:
        width = len(str(self._amount))
        self._console.print(Text(f"[{self.done:{width}d}/{self._amount}] {line}"), soft_wrap=True)

    def _result(self, job: Job, outcome: Outcome) -> str:
        curve = outcome.curve
        if outcome.status == "failed":
            return f"failed: {outcome.error}"
        if outcome.status == "diverged":
            return f"diverged at step {outcome.diverged_at} (lr {outcome.lr:g})"
        parts = [f"training loss {numbers.short(curve.train_loss[-1])}"]
        if curve.validation_loss:
            parts.append(f"validation loss {numbers.short(curve.validation_loss[-1])}")
        if outcome.test_metric is not None and job.metric:
            parts.append(f"test {job.metric} {numbers.metric(outcome.test_metric, job.metric)}")
        return ", ".join([*parts, numbers.seconds(curve.seconds[-1])])
