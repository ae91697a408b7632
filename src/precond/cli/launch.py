"""From settings to results: what ``compare`` and ``train`` share."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from precond.cli.errors import UserError, as_user_errors
from precond.cli.experiment import Experiment
from precond.cli.folder import Folder
from precond.cli.progress import Live
from precond.cli.settings import RUNNING, Lr, Settings
from precond.cli.stopping import stopping
from precond.cli.tables import final_table
from precond.report import Results, Target, default_target, save_page, save_results, table
from precond.report.environment import machine, versions
from precond.report.results import to_json
from precond.workloads import CheckpointError, Entrant, Interrupted, Plan, Problem, Workload, WriteError, load_workload
from precond.workloads.randomness import isolated


def launch(
    command: str, settings: Settings, entrants: Sequence[Entrant], seeds: tuple[int, ...], lr: Lr, argv: Sequence[str]
) -> int:
    """Train, show, and save; the exit code.

    Raises:
        UserError: for anything that the user can put right.
    """
    with as_user_errors():
        settings.check()
        torch.set_num_threads(settings.threads)
        identity = {"command": command, **to_json(asdict(settings)), **versions()}
        identity = {name: value for name, value in identity.items() if name not in RUNNING}
        experiment, problem = _experiment(settings, tuple(entrants), seeds, lr)
    folder = Folder(settings.out or _default_folder(command, settings.data, identity), settings.checkpoint_seconds)
    if command == "train":
        experiment = replace(experiment, model_path=folder.path / "model.pt")
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    line = shlex.join(["precond", *argv])
    try:
        lock = folder.claim(identity, settings.resume)
        with stopping() as stop, Live(console, experiment.amount(), stop, problem.metric) as live:
            try:
                entries = experiment.run(folder, live)
            except Interrupted as interrupted:
                return _interrupted(live, interrupted, folder, line, stop.signal or signal.SIGINT)
        target = default_target(entries) if settings.target is None else _given(settings.target, problem)
        results = Results(
            title=f"precond {command}: {settings.data}",
            command=line,
            created=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
            metric=problem.metric,
            facts=dict(experiment.workload.facts),
            settings={name: value for name, value in identity.items() if name not in versions()},
            versions=versions(),
            machine=machine(settings.device),
            target=target,
            entries=entries,
        )
        rows = table(results)
        save_results(folder.path / "results.json", results, [row.as_dict() for row in rows])
        save_page(folder.path / "report.html", results)
    except (CheckpointError, WriteError) as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(f"cannot work in {folder.path}: {error}; name another folder with --out") from error
    if lock is not None:
        lock.close()
    if live.known:
        console.print(f"{live.known} of {experiment.amount()} trainings were done before (--no-resume repeats them).")
    console.print(final_table(results, rows))
    saved = ["report.html", "results.json"] + (["model.pt"] if experiment.model_path else [])
    console.print(Text(f"Saved in {folder.path}: {', '.join(saved)}"), soft_wrap=True)
    return 0


def _experiment(
    settings: Settings, entrants: tuple[Entrant, ...], seeds: tuple[int, ...], lr: Lr
) -> tuple[Experiment, Problem]:
    """Everything that can be checked before training starts is."""
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ValueError(f"seeds must be different whole numbers >= 0, got {','.join(map(str, seeds)) or 'none'}")
    if isinstance(lr, float) and not 0 < lr < math.inf:
        raise ValueError(f"lr must be > 0, got {lr:g}")
    workload = _workload(settings)
    with isolated(seeds[0]):
        problem = workload.problem()
        for entrant in entrants:
            with as_user_errors(f"{entrant.label}: "):
                entrant.optimizer(problem.model, entrant.lr)
    steps = settings.steps or max(1, round(settings.epochs * len(problem.parts["train"])))
    if settings.warmup >= steps:
        raise ValueError(f"warmup must be shorter than the training of {steps} steps, got {settings.warmup}")
    plan = Plan(None, steps, seeds[0], settings.schedule, settings.warmup, settings.evaluations)
    experiment = Experiment(workload, entrants, plan, seeds, lr, settings.candidates(), settings.search_seed)
    searched = [entrant.label for entrant in entrants if experiment.lr_from(entrant) == "searched"]
    if searched and "validation" not in problem.parts:
        raise ValueError(f"a search of the learning rate needs validation data, and {settings.data} has none; give --lr")
    return experiment, problem


def _workload(settings: Settings) -> Workload:
    try:
        torch.zeros((), device=settings.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {settings.device!r} does not work: {str(error).splitlines()[0]}; use --device cpu") from error
    if ":" in settings.data:
        # A console script does not look in the current folder by itself.
        sys.path.insert(0, os.getcwd())
    return load_workload(
        settings.data,
        settings.architecture(),
        batch_size=settings.batch_size,
        device=settings.device,
        folder=settings.data_dir,
        examples=settings.examples,
        seed=settings.split_seed,
    )


def _default_folder(command: str, data: str, identity: dict[str, Any]) -> Path:
    """Other settings, other folder: the same command finds its own work again."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:6]
    return Path("runs") / f"{command}-{data.replace(':', '-')}-{digest}"


def _given(value: float, problem: Problem) -> Target:
    return Target(value, "validation" if "validation" in problem.parts else "train", "given with --target")


def _interrupted(live: Live, interrupted: Interrupted, folder: Folder, line: str, number: int) -> int:
    job = live.current
    under_way = "" if job is None else f"; {job.title} is saved at step {interrupted.step} of {job.plan.steps}"
    print(f"\nInterrupted: {live.done} trainings are done{under_way}, in {folder.path}.", file=sys.stderr)
    print(f"Go on to the same numbers with the same command:\n  {line}", file=sys.stderr)
    return 128 + number
