"""``precond verify``."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from precond.lab.cli.errors import UserError, as_user_errors
from precond.lab.cli.folder import sole
from precond.lab.evidence import Section, as_expected, chosen, measured, sections, study
from precond.lab.report.environment import machine, versions
from precond.lab.report.evidence import SIGNS, counts, expected, number, save_evidence, tolerance
from precond.lab.report.study import load_study, save_study
from precond.lab.workloads import load_data

_COLORS = {"holds": "green", "holds as corrected": "yellow", "holds in part": "magenta", "fails": "bold red"}


@dataclass(frozen=True)
class Verify:
    """Measure each statement of the paper on real data: a table with expected, measured, tolerance and verdict, and one HTML page.

    The exit code is 0 where every statement holds with every seed (one that is not right as printed counts where its correction holds), else 1.

    Attributes:
        only: Statements, or settings of the study, by name or pattern, with commas: "rate,l2-*" or "digits-*"; all if not given.
        out: Folder for evidence.html (with plots) and verify.md (the table), or for results.json and z-versus-p.md of the study.
        seeds: How many; 1 measures with all samples of the data, each further one with other first weights, maps and vectors and four fifths
            of the samples.
        experiment: Instead of the statements, a study: z-versus-p trains with penalties in p and in z on small data (three quarters of an hour;
            an interrupted one goes on with the same command).
        data_dir: Where the study finds Fashion-MNIST; $FASHION_MNIST, or where Debian's package puts it, if not given.
    """

    only: Annotated[str, tyro.conf.arg(metavar="A,B,…")] = ""
    out: Path = Path("runs/verify")
    seeds: int = 5
    experiment: Literal["z-versus-p"] | None = None
    data_dir: Path | None = None

    def run(self, argv: Sequence[str]) -> int:
        """The exit code."""
        only = [part.strip() for part in self.only.split(",") if part.strip()]
        # Small matrices: more threads only wait for each other.
        torch.set_num_threads(1)
        console = Console(highlight=False)
        if not console.is_terminal:
            console = Console(highlight=False, width=160)
        if self.experiment is not None:
            with sole(self.out):
                return self._study(console, only, argv)
        with as_user_errors():
            if self.seeds < 1:
                raise UserError(f"--seeds must be at least 1, got {self.seeds}")
            entries = chosen(only)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with sole(self.out):
            found = []
            with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
                task = progress.add_task("", total=len(entries))
                for chapter, entry in entries:
                    progress.update(task, description=entry.name)
                    found.append((chapter, measured(entry, range(self.seeds))))
                    progress.advance(task)
            parts = sections(found)
            show(parts, console)
            with as_user_errors():
                save_evidence(self.out, parts, {**versions(), **machine("cpu")}, shlex.join(["precond", *argv]))
        console.print(Text(f"Saved in {self.out}: evidence.html, verify.md"), soft_wrap=True)
        return 0 if as_expected(parts) else 1

    def _study(self, console: Console, only: Sequence[str], argv: Sequence[str]) -> int:
        settings = study.settings(partial(_fashion_mnist, self.data_dir))
        with as_user_errors():
            wanted = [s for s in settings if not only or any(fnmatchcase(s.name, pattern) for pattern in only)]
            if not wanted:
                raise UserError(f"no setting is called {self.only!r}; there are {', '.join(s.name for s in settings)}")
            for setting in wanted:
                setting.data()  # what is missing should be missed now
            found = list(load_study(self.out / "results.json", settings))
        facts, command = {**versions(), **machine("cpu")}, shlex.join(["precond", *argv])
        cells = [(setting, method) for setting in wanted for method in study.methods()]
        for index, (setting, method) in enumerate(cells, 1):
            result = next((r for r in found if (r.setting, r.method) == (setting.name, method.label)), None)
            if result is None:
                result = study.result(setting, method)
                found.append(result)
                with as_user_errors():
                    save_study(self.out, settings, found, facts, command)
            loss, width = study.interval([score.test for score in result.scores])
            text = f"{index} of {len(cells)}  {setting.name}, {method.label}: test loss {loss:.3f} ± {width:.3f}"
            console.print(Text(text))
        with as_user_errors():
            save_study(self.out, settings, found, facts, command)
        console.print(Text(f"Saved in {self.out}: results.json, z-versus-p.md"), soft_wrap=True)
        return 0


@cache
def _fashion_mnist(folder: Path | None) -> tuple[torch.Tensor, torch.Tensor]:
    part = load_data("fashion-mnist", folder=folder).parts["train"]
    return part.inputs.flatten(1), part.targets


def show(parts: Sequence[Section], console: Console) -> None:
    """The table of each chapter, then the corrections, then the sum."""
    for section in parts:
        table = Table(title=section.title, title_justify="left")
        table.add_column("statement", overflow="fold", ratio=1)
        for heading in ("expected", "measured", "tolerance", "seeds")[: 3 + bool(section.statements[0].others)]:
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("verdict")
        for s in section.statements:
            claim = Text.assemble((s.name, "bold"), f"  {s.claim} ", (f"{s.where}; {s.finding.quantity}", "dim"))
            verdict = Text(f"{SIGNS[s.verdict]} {s.verdict}", style=_COLORS[s.verdict])
            held = (f"{s.held} of {len(s.findings)}",) if s.others else ()
            table.add_row(claim, expected(s), number(s.finding.measured), tolerance(s), *held, verdict)
        console.print(table)
    for s in (s for section in parts for s in section.statements if s.correction):
        printed = "" if s.finding.printed is None else f" As printed: {number(s.finding.printed)}."
        console.print(Text.assemble((s.name, "bold"), f"  {s.correction}{printed}"))
    console.print(Text(", ".join(f"{count} {verdict}" for verdict, count in counts(parts).items() if count)))
