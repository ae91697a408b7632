"""``precond diagnose``."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.text import Text

from precond.algebra import checks
from precond.analysis.curvature import Objective
from precond.analysis.diagnostics import Diagnosis, diagnose
from precond.analysis.diagnostics.diagnosis import Matrix
from precond.analysis.diagnostics.numbers import number
from precond.analysis.diagnostics.short import one_step
from precond.analysis.diagnostics.text import WIDTH, lines
from precond.analysis.diagnostics.trying import Tried, cheap, try_remedies, with_rates
from precond.lab.cli.errors import UserError, as_user_errors
from precond.lab.cli.folder import file_name, sole
from precond.lab.cli.target import Target
from precond.lab.report.diagnosis import save_diagnosis
from precond.lab.report.environment import machine, versions
from precond.lab.report.results import to_json
from precond.lab.workloads import write_atomically
from precond.lab.workloads.randomness import isolated


@dataclass(frozen=True)
class Diagnose(Target):
    """Find where training is slow, layer by layer, and what would mend it: advice with predicted gains, and one HTML page.

    Attributes:
        steps: Steps to take before, over the batches in turn. Without any, an adaptive P is not known.
        try_: Train shortly as now and with each of the first three remedies, at rates of their own, and show the curves.
        try_steps: Steps of each of these trainings.
        rates: Find the learning rate of each remedy by a range test; if not said, where a step is cheap.
        curvature: Also κ of each layer's block of the Hessian or Gauss-Newton matrix, before and after P, and the largest stable learning rate.
        samples: Inputs per layer of which spectra are made.
        max_inputs: Pass by layers with more inputs.
        layers: Diagnose so many layers at most; of stacks of equal ones some at equal distances.
        out: Folder of diagnosis.html and diagnosis.json; one under runs/ if not given.
    """

    steps: int = 0
    try_: Annotated[bool, tyro.conf.arg(name="try")] = False
    try_steps: int = 150
    rates: bool | None = None
    curvature: Matrix = "none"
    samples: int = 16384
    max_inputs: int = 2048
    layers: int = 32
    out: Path | None = None

    def run(self, argv: Sequence[str]) -> int:
        """The exit code."""
        with as_user_errors():
            checks.whole(
                "diagnose", examples=self.examples, samples=self.samples, threads=self.threads, batch_size=self.batch_size,
                max_inputs=self.max_inputs, layers=self.layers, try_steps=self.try_steps,
            )  # fmt: skip
            checks.count("diagnose", steps=self.steps)
            torch.set_num_threads(self.threads)
        folder = self.out or Path("runs") / file_name(f"diagnose {self.target}", "._")
        console = Console(highlight=False)
        if not console.is_terminal:
            console = Console(highlight=False, width=WIDTH)
        with as_user_errors(), isolated(self.seed):
            objective, optimizer, facts = self.problem()
            with sole(folder):
                self._train(objective, optimizer)
                found, tried = self._found(objective, optimizer, console)
                self._save(folder, found, tried, facts, shlex.join(["precond", *argv]))
        show(found, tried, console)
        console.print(Text(f"Saved in {folder}: diagnosis.html, diagnosis.json"), soft_wrap=True)
        return 0

    def _found(self, objective: Objective, optimizer: Any, console: Console) -> tuple[Diagnosis, tuple[Tried, ...]]:
        with console.status("looking at what layers receive") as status:
            found = diagnose(
                objective,
                optimizer,
                curvature=self.curvature,
                samples=self.samples,
                max_inputs=self.max_inputs,
                layers=self.layers,
            )

            def watch(text: str) -> None:
                status.update(Text(text))

            if self.try_:
                return try_remedies(found, objective, optimizer, steps=self.try_steps, watch=watch)
            if self.rates or (self.rates is None and cheap(objective)):
                found = with_rates(found, objective, watch)
            return found, ()

    def _save(self, folder: Path, found: Diagnosis, tried: Sequence[Tried], facts: dict[str, str], line: str) -> None:
        optimizer = found.optimizer or f"{found.against}, as none is given"
        facts |= {"loss": number(found.loss), "optimizer": optimizer, "steps before": str(self.steps)}
        if found.lr is not None:
            facts["learning rate"] = number(found.lr)
        facts |= {**versions(), **machine(self.device)}
        save_diagnosis(folder / "diagnosis.html", found, f"precond diagnose: {self.target}", facts, line, tried)
        shown = [
            {"label": t.label, "ratio": t.ratio, "predicted": t.predicted, "why": t.why, "curve": t.curve and vars(t.curve)}
            for t in tried
        ]
        content = to_json({"command": line, "facts": facts, **found.as_dict(), "tried": shown})
        write_atomically(folder / "diagnosis.json", json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False))

    def _train(self, objective: Objective, optimizer: Any) -> None:
        if not self.steps:
            return
        if optimizer is None:
            raise UserError("--steps needs an optimizer; give --recipe, such as --recipe adam, or return one from the factory")
        before = [(module, module.training) for module in objective.model.modules()]
        objective.model.train()
        for step in range(self.steps):
            try:
                value = one_step(objective, optimizer, step % len(objective.batches))
            except FloatingPointError as error:
                raise self._diverged(step, str(error).partition(":")[0]) from error
            if not math.isfinite(value):
                raise self._diverged(step, f"the loss is {value}")
        for module, training in before:
            module.training = training

    @staticmethod
    def _diverged(step: int, what: str) -> UserError:
        return UserError(f"training diverged at step {step + 1}: {what}; give a smaller --lr, or look at the data")


def show(found: Diagnosis, tried: Sequence[Tried], console: Console) -> None:
    """The advice and the table on the terminal."""
    for line, style in lines(found):
        console.print(Text(line, style=style), soft_wrap=True)
    if tried:
        console.print(Text("\nTried:", style="bold"))
        for one in tried:
            console.print(Text(f"   {one}"))
            if one.predicted:
                console.print(Text(f"      predicted: {one.predicted}"))
