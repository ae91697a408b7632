"""``precond bench``."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from precond.lab.cli.calibrate import calibrate
from precond.lab.cli.errors import UserError, as_user_errors
from precond.lab.cli.launch import More, Where, launch
from precond.lab.cli.settings import Integers, Texts
from precond.lab.report.results import Results, to_json
from precond.lab.report.transfer import transfer_figure, transfer_markdown
from precond.lab.report.where import where_figure, where_markdown
from precond.lab.workloads import Task, transfer
from precond.lab.workloads.fashion_study import fashion_tasks
from precond.lab.workloads.pool import RULES as POOL_RULES
from precond.lab.workloads.pool import pool_tasks
from precond.lab.workloads.pool.halves import HALVES
from precond.lab.workloads.pool.tasks import SEEDS, TRIALS
from precond.lab.workloads.race import RULES, race_tasks
from precond.lab.workloads.transfer import RULES as TRANSFER_RULES
from precond.lab.workloads.transfer import transfer_tasks
from precond.lab.workloads.where import RULES as WHERE_RULES
from precond.lab.workloads.where import predictions, where_tasks

Name = Literal[
    "fashion-mnist",
    "race",
    "pool",
    "pool-locked",
    "pool-opened",
    "pool-confirmation",
    "pool-held-out",
    "pool-sealed",
    "pool-final",
    "pool-blind",
    "where",
    "transfer",
    "calibration",
]


def _where(tasks: Sequence[Task], results: Results) -> dict[str, str]:
    found = [prediction for task in tasks for prediction in predictions(task)]
    return {"where.md": where_markdown(results, found), "where.svg": where_figure(results, found)}


def _transfer(tasks: Sequence[Task], results: Results) -> dict[str, str]:
    along = {"width": "width", "width-spectral": "width, spectral head", "depth": "depth"}
    figures = {f"transfer-{file}.svg": transfer_figure(results, what) for file, what in along.items()}
    return {"transfer.md": transfer_markdown(results), **figures}


@dataclass(frozen=True)
class Experiment:
    """One experiment.

    Attributes:
        tasks: makes its tasks.
        rules: under which entrants are compared.
        trials, seeds: how many and which, if not told.
        more: texts that are written beside the results, by the names of their files.
    """

    tasks: Callable[..., tuple[Task, ...]]
    rules: tuple[str, ...] = ()
    trials: int = 5
    seeds: tuple[int, ...] = (0, 1, 2)
    more: More | None = None


# A new experiment is one row here.
EXPERIMENTS: dict[str, Experiment] = {
    "fashion-mnist": Experiment(fashion_tasks),
    "race": Experiment(race_tasks, RULES),
    **{
        "pool" if half == "development" else f"pool-{half}": Experiment(partial(pool_tasks, half), POOL_RULES, TRIALS, SEEDS)
        for half in HALVES
    },
    "where": Experiment(where_tasks, WHERE_RULES, more=_where),
    "transfer": Experiment(transfer_tasks, TRANSFER_RULES, transfer.TRIALS, transfer.SEEDS, _transfer),
}


@dataclass(frozen=True)
class Bench:
    """Run an experiment of this project: a table of tasks and entrants, with a search for each, and a report.

    Attributes:
        name: Which. pool has the tasks of the pool that are for development; pool-locked those for a final table alone; pool-opened those
            that were locked once; pool-confirmation, pool-held-out, pool-sealed, pool-final and pool-blind those that were written without
            knowing how auto does on them, each for one table. where: gains of preconditioned inputs against what diagnose predicts;
            transfer: best rates over widths and depths, the seeds being those of searches; calibration: what diagnose
            predicts against trainings (of the settings below it has --tasks and --out alone).
        tasks: Only the tasks whose names contain one of these, as whole words: "batch 60" or MLP. Several commands with different
            tasks may work in one output folder at the same time; one without --tasks then makes the report of all.
        entrants: Only these: those whose labels contain one of these as whole words, muon or "torch Muon", and who sets the target. A later
            command with more of them goes on in the same output folder.
        trials: Learning rates that each entrant tries in each task (5 if not given, 7 in the pool); nothing is chosen on the test part.
        seeds: One training per seed with the best of them (0,1,2 if not given, five in the pool).
        scale: Times the steps of the table; less for a first look.
        examples: Train on a stratified sample of so many examples.
        data_dir: Folder of the IDX files of fashion-mnist; $FASHION_MNIST, or where Debian's package puts them, if not given.
        out: Output folder; runs/bench-NAME if not given.
        resume: Go on where the same command left off in the output folder; otherwise start all over.
        checkpoint_seconds: Shortest time between two checkpoints.
    """

    name: tyro.conf.Positional[Name]
    tasks: Texts = ()
    entrants: Texts = ()
    trials: int | None = None
    seeds: Integers | None = None
    scale: float = 1.0
    examples: int | None = None
    data_dir: Path | None = None
    out: Path | None = None
    resume: bool = True
    checkpoint_seconds: float = 30.0

    def run(self, argv: Sequence[str]) -> int:
        """The exit code."""
        if self.name == "calibration":
            return calibrate(self.out or Path("runs/bench-calibration"), self.tasks, argv)
        # One thread, so that the processor's clock tells the work of each training whatever else the machine does.
        torch.set_num_threads(1)
        experiment = EXPERIMENTS[self.name]
        trials = experiment.trials if self.trials is None else self.trials
        seeds = experiment.seeds if self.seeds is None else self.seeds
        if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise UserError(f"seeds must be different whole numbers >= 0, got {','.join(map(str, seeds)) or 'none'}")
        if trials < 1:
            raise UserError(f"trials must be at least 1, got {trials}")
        if not 0 < self.scale < math.inf:
            raise UserError(f"scale must be > 0 and finite, got {self.scale:g}")
        with as_user_errors():
            every = experiment.tasks(seeds, trials, self.scale, self.data_dir, self.examples)
        chosen = tuple(task for task in every if not self.tasks or _wanted(self.tasks, task.name))
        if not chosen:
            raise UserError(f"no task of {self.name} contains {' or '.join(map(repr, self.tasks))}; there are "
                            f"{'; '.join(task.name for task in every)}")  # fmt: skip
        if self.entrants:
            labels = dict.fromkeys(c.label for task in every for c in task.contenders)
            for word in self.entrants:
                if not any(_wanted((word,), label) for label in labels):
                    raise UserError(f"no entrant of {self.name} contains {word!r}; there are {'; '.join(labels)}")
            chosen = tuple(task.only(partial(_wanted, self.entrants)) for task in chosen)
        settings: dict[str, Any] = to_json(
            {"name": self.name, "trials": trials, "seeds": seeds, "scale": self.scale, "examples": self.examples}
        )
        where = Where(self.out or Path("runs") / f"bench-{self.name}", self.resume, self.checkpoint_seconds)
        return launch(f"bench {self.name}", chosen, settings, where, argv, experiment.rules, experiment.more)


def _wanted(words: Iterable[str], name: str) -> bool:
    """Whether a name contains one of these as whole words."""
    return any(re.search(rf"\b{re.escape(word)}\b", name) for word in words)
