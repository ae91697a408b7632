"""One task from settings: what ``compare`` and ``train`` share."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from precond.lab.cli.errors import as_user_errors
from precond.lab.cli.launch import Where, launch
from precond.lab.cli.settings import RUNNING, Lr, Settings
from precond.lab.report.results import to_json
from precond.lab.workloads import Contender, Entrant, LogUniform, Plan, Task, Workload, load_workload
from precond.lab.workloads.randomness import isolated


def compare(
    command: str, settings: Settings, entrants: Sequence[Entrant], seeds: tuple[int, ...], lr: Lr, argv: Sequence[str]
) -> int:
    """Train entrants on what the settings name; the exit code.

    Raises:
        UserError: for anything that the user can put right.
    """
    with as_user_errors():
        settings.check()
        torch.set_num_threads(settings.threads)
        identity: dict[str, Any] = {"command": command, **to_json(asdict(settings))}
        task = _task(settings, entrants, seeds, lr)
    identity = {name: value for name, value in identity.items() if name not in RUNNING}
    where = Where(settings.out, settings.resume, settings.checkpoint_seconds, settings.device, model=command == "train")
    return launch(f"{command} {settings.data}", [task], identity, where, argv)


def _task(settings: Settings, entrants: Sequence[Entrant], seeds: tuple[int, ...], lr: Lr) -> Task:
    """Everything that can be checked before training starts is."""
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ValueError(f"seeds must be different whole numbers >= 0, got {','.join(map(str, seeds)) or 'none'}")
    if isinstance(lr, float) and not 0 < lr < math.inf:
        raise ValueError(f"lr must be > 0, got {lr:g}")
    workload, search, space = _workload(settings), settings.search(), settings.space()
    with isolated(seeds[0]):
        problem = workload.problem()
        for entrant in entrants:
            with as_user_errors(f"{entrant.label}: "):
                entrant.optimizer(problem.model, entrant.lr)
    steps = settings.steps or max(1, round(settings.epochs * len(problem.parts["train"])))
    if settings.warmup >= steps:
        raise ValueError(f"warmup must be shorter than the training of {steps} steps, got {settings.warmup}")
    rate: LogUniform | float | None = space if lr == "search" else None if lr == "default" else float(lr)
    contenders = tuple(Contender(entrant, lambda: workload, rate) for entrant in entrants)
    if any(c.lr_from == "searched" for c in contenders) and "validation" not in problem.parts:
        raise ValueError(f"a search of the learning rate needs validation data, and {settings.data} has none; give --lr")
    plan = Plan(None, steps, seeds[0], settings.schedule, settings.warmup, settings.evaluations)
    return Task(
        settings.data, contenders, plan, seeds, search, settings.search_seed, problem.metric, workload.facts,
        target=settings.target,
    )  # fmt: skip


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
