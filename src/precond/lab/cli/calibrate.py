"""``precond bench calibration``."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from precond.lab.cli.errors import UserError, as_user_errors
from precond.lab.cli.folder import sole
from precond.lab.report.environment import versions
from precond.lab.workloads import write_atomically
from precond.lab.workloads.calibrating import HORIZONS, Cell, cells, summarized
from precond.lab.workloads.calibration import BASES, settings


def calibrate(folder: Path, only: Sequence[str], argv: Sequence[str]) -> int:
    """Train every setting under every optimizer that is not in the folder yet, and compare with what is predicted.

    The folder gets ``cells.json``, ``calibration.json`` (what ``diagnose`` reads, where it lies beside its code) and ``table.md``;
    ``curves/`` has one file for each setting and optimizer that is done, so that an interrupted study goes on.

    Args:
        folder: of the study.
        only: settings whose names contain one of these as whole words; none: all.
        argv: the command line.
    """
    torch.set_num_threads(1)
    chosen = [s for s in settings() if not only or any(re.search(rf"\b{re.escape(word)}\b", s.name) for word in only)]
    if not chosen:
        raise UserError(
            f"no task of calibration contains {' or '.join(map(repr, only))}; there are {'; '.join(s.name for s in settings())}"
        )
    console = Console(highlight=False)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    found: list[Cell] = []
    with sole(folder), Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(chosen) * len(BASES))
        for setting in chosen:
            for base in BASES:
                with as_user_errors():
                    found += cells(setting, base, folder / "curves", lambda text: progress.update(task, description=text))
                progress.advance(task)
        result = {"command": shlex.join(["precond", *argv]), "versions": versions(), **summarized(found)}
        write_atomically(folder / "cells.json", json.dumps([vars(cell) for cell in found], ensure_ascii=False, indent=0))
        write_atomically(folder / "calibration.json", json.dumps(result, ensure_ascii=False, indent=1))
        write_atomically(folder / "table.md", table(found))
    console.print(f"{result['held']} of {result['judged']} measured ratios lay in their intervals, over {HORIZONS[-1]} steps")
    console.print(f"Saved in {folder}: cells.json, calibration.json, table.md")
    return 0


def table(found: Sequence[Cell]) -> str:
    """The cells of the longest horizon as Markdown."""
    lines = [
        "| task, model | optimizer | remedy | stuck | quadratic model | κ alone | measured |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {c.task}, {c.model} | {c.base} | {c.remedy} | {100 * c.stuck:.0f} % | {c.predicted:.2g} | {c.kappa:.1g} | {c.measured:.2g} |"
        for c in found
        if c.horizon == HORIZONS[-1]
    ]
    return "\n".join(lines) + "\n"
