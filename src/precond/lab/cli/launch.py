"""From tasks to results: what ``compare``, ``train`` and ``bench`` share."""

from __future__ import annotations

import hashlib
import json
import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from precond.lab.cli.errors import UserError
from precond.lab.cli.folder import Folder, cannot_work, file_name
from precond.lab.cli.progress import Live
from precond.lab.cli.stopping import stopping
from precond.lab.cli.study import Study, folder_name
from precond.lab.cli.tables import final_tables, overall_table
from precond.lab.report import Clock, Results, save
from precond.lab.report.environment import machine, versions
from precond.lab.workloads import CheckpointError, Interrupted, Task, WriteError, write_atomically


@dataclass(frozen=True)
class Where:
    """Where a command works, and how.

    Attributes:
        out: the folder; None: one that is named by command and settings.
        resume: go on in it.
        checkpoint_seconds: shortest time between two checkpoints.
        device: where to train.
        model: save the last model.
    """

    out: Path | None
    resume: bool
    checkpoint_seconds: float
    device: str = "cpu"
    model: bool = False


More = Callable[[Sequence[Task], Results], Mapping[str, str]]
"""Tasks and their results ↦ texts by the names of their files."""


def launch(
    title: str,
    tasks: Sequence[Task],
    settings: dict[str, Any],
    where: Where,
    argv: Sequence[str],
    rules: Sequence[str] = (),
    more: More | None = None,
) -> int:
    """Train, show, and save; the exit code.

    Args:
        title: of the command, such as ``"compare digits"``.
        tasks: in order.
        settings: everything that the results depend on, as JSON's own types.
        where: folder and device.
        argv: the command's own arguments.
        rules: under which entrants are compared.
        more: what is written beside the results.

    Raises:
        UserError: for anything that the user can put right.
    """
    identity = {**settings, **versions()}
    folder = Folder(where.out or _default_folder(title, identity), where.checkpoint_seconds)
    model = folder.path / "model.pt" if where.model else None
    if model is not None and model.exists() and not (folder.path / "settings.json").exists():
        raise UserError(f"{model} is there already, of no run of this command; move it away, or name another folder with --out")
    study = Study(tasks, model)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    line = shlex.join(["precond", *argv])
    try:
        with folder.claimed(identity, map(folder_name, tasks), where.resume):
            for words in study.budget():
                console.print(Text(words), soft_wrap=True)
            with stopping() as stop, Live(console, study.amount, stop) as live:
                try:
                    found = study.run(folder, live)
                except Interrupted as interrupted:
                    return _interrupted(live, interrupted, folder, line, stop.signal or signal.SIGINT)
            # With one thread on the processor its own clock counts the work of this process alone.
            clock: Clock = "cpu_seconds" if torch.get_num_threads() == 1 and where.device == "cpu" else "seconds"
            results = Results(
                title=f"precond {title}",
                command=line,
                created=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
                clock=clock,
                settings=settings,
                versions=versions(),
                machine=machine(where.device),
                tasks=found,
                rules=(*rules, *study.not_run()),
            )
            with folder.alone():
                saved = save(folder.path, results)
                # A training that failed left none.
                saved += ["model.pt"] if model is not None and model.exists() else []
                for name, text in (more(tasks, results) if more else {}).items():
                    write_atomically(folder.path / name, text)
                    saved.append(name)
    except (CheckpointError, WriteError) as error:
        raise UserError(str(error)) from error
    except BrokenPipeError:  # nobody reads what is printed
        raise
    except OSError as error:
        raise cannot_work(folder.path, error) from error
    if live.known:
        console.print(f"{live.known} of {study.amount} trainings were done before (--no-resume repeats them).")
    for drawn in final_tables(results, console.width):
        console.print(drawn)
    if (means := overall_table(results, console.width)) is not None:
        console.print(means)
    console.print(Text(f"Saved in {folder.path}: {', '.join(saved)}"), soft_wrap=True)
    # An entrant that failed is a result among others; where nothing else came out, the command failed.
    return 1 if all(run.status == "failed" for task in found for entry in task.entries for run in entry.runs) else 0


def _default_folder(title: str, identity: dict[str, Any]) -> Path:
    """Other settings, other folder: the same command finds its own work again."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:6]
    return Path("runs") / f"{file_name(title, '._')}-{digest}"


def _interrupted(live: Live, interrupted: Interrupted, folder: Folder, line: str, number: int) -> int:
    job = live.current
    saved = f"is saved at step {interrupted.step} of {job.plan.steps}" if interrupted.saved and job else "starts over"
    under_way = "" if job is None else f"; {job.title} {saved}"
    print(f"\nInterrupted: {live.done} trainings are done{under_way}, in {folder.path}.", file=sys.stderr)
    print(f"Go on to the same numbers with the same command:\n  {line}", file=sys.stderr)
    return 128 + number
