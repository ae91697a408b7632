"""``precond diagnose``."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from precond import checks
from precond.cli.errors import UserError, as_user_errors
from precond.cli.folder import file_name, sole
from precond.cli.settings import Integers
from precond.curvature import Objective
from precond.diagnostics import Diagnosis, diagnose
from precond.diagnostics.advice import number
from precond.diagnostics.diagnosis import LABELS, Matrix, block_texts
from precond.report.diagnosis import save_diagnosis
from precond.report.environment import machine, versions
from precond.report.results import to_json
from precond.workloads import Entrant, load_workload, parse_entrants, write_atomically
from precond.workloads.factory import import_factory
from precond.workloads.models import Activation, Architecture, Kind, Normalization
from precond.workloads.randomness import isolated

_WANTED = "an Objective, (objective, optimizer), or (model, loss_fn, data)"


@dataclass(frozen=True)
class Diagnose:
    """Find where training is slow, layer by layer, and what would mend it: a table and one HTML page.

    Attributes:
        target: Data set (digits, wine, breast-cancer, diabetes, fashion-mnist), or your own package.module:factory, a function
            without arguments that returns an Objective, (objective, optimizer), or (model, loss_fn, data).
        recipe: Optimizer whose P is looked at, as in precond train: adam, "adam(inputs=BNP())"; plain gradient descent if not given.
            A factory may return its own instead.
        lr: Learning rate of the recipe; its default if not given.
        steps: Steps to take before, over the batches in turn. Without any, an adaptive P is not known.
        curvature: Also κ of each layer's block of the Hessian or Gauss-Newton matrix, before and after P, and the largest stable learning rate.
        examples: Look at so many training examples at most.
        batch_size: Of the steps.
        samples: Inputs per layer of which spectra are made.
        model: Model for the data sets.
        widths: Units of the hidden layers, or channels of the convolutions.
        normalization: Of the inputs of each layer.
        activation: Between layers.
        data_dir: Folder of the IDX files of fashion-mnist; $FASHION_MNIST, or where Debian's package puts them, if not given.
        seed: Of the model and of dropout.
        threads: Threads of torch.
        device: Where to compute: cpu, cuda, ....
        out: Folder of diagnosis.html and diagnosis.json; one under runs/ if not given.
    """

    target: tyro.conf.Positional[str] = "digits"
    recipe: str | None = None
    lr: float | None = None
    steps: int = 0
    curvature: Matrix = "none"
    examples: int = 5000
    batch_size: int = 64
    samples: int = 16384

    model: Kind = "mlp"
    widths: Integers = (64, 64)
    normalization: Normalization = "none"
    activation: Activation = "relu"
    data_dir: Path | None = None

    seed: int = 0
    threads: int = 1
    device: str = "cpu"
    out: Path | None = None

    def run(self, argv: Sequence[str]) -> int:
        """The exit code."""
        with as_user_errors():
            checks.positive(
                "diagnose", examples=self.examples, samples=self.samples, threads=self.threads, batch_size=self.batch_size
            )
            checks.non_negative("diagnose", steps=self.steps)
            torch.set_num_threads(self.threads)
        folder = self.out or Path("runs") / file_name(f"diagnose {self.target}", "._")
        with as_user_errors(), isolated(self.seed):
            objective, optimizer, facts = self._problem()
            with sole(folder):
                self._train(objective, optimizer)
                found = diagnose(objective, optimizer, curvature=self.curvature, samples=self.samples)
                self._save(folder, found, facts, shlex.join(["precond", *argv]))
        console = Console(highlight=False)
        if not console.is_terminal:
            console = Console(highlight=False, width=160)
        show(found, console)
        console.print(Text(f"Saved in {folder}: diagnosis.html, diagnosis.json"), soft_wrap=True)
        return 0

    def _save(self, folder: Path, found: Diagnosis, facts: dict[str, str], line: str) -> None:
        facts |= {"loss": number(found.loss), "optimizer": found.optimizer or "none: P = I", "steps before": str(self.steps)}
        if found.lr is not None:
            facts["learning rate"] = number(found.lr)
        facts |= {**versions(), **machine(self.device)}
        save_diagnosis(folder / "diagnosis.html", found, f"precond diagnose: {self.target}", facts, line)
        content = to_json({"command": line, "facts": facts, **found.as_dict()})
        write_atomically(folder / "diagnosis.json", json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False))

    # --- what is looked at ---------------------------------------------------------------------------------------------------

    def _problem(self) -> tuple[Objective, Any, dict[str, str]]:
        entrant = self._entrant()
        if ":" in self.target:
            # A console script does not look in the current folder by itself.
            sys.path.insert(0, os.getcwd())
            objective, optimizer = self._made(import_factory(self.target))
            facts = {"data": f"what {self.target} returns"}
        else:
            architecture = Architecture(self.model, self.widths, self.normalization, self.activation)
            workload = load_workload(
                self.target, architecture, batch_size=self.batch_size, device=self.device, folder=self.data_dir
            )
            problem = workload.problem()
            objective = Objective(problem.model, problem.loss_fn, _limited(problem.parts["train"].epoch(0), self.examples))
            optimizer, facts = None, dict(workload.facts)
        if entrant is not None:
            if optimizer is not None:
                raise UserError(
                    f"{self.target} returns an optimizer of its own; leave --recipe out, or return the objective alone"
                )
            optimizer = entrant.optimizer(objective.model, self.lr)
        elif self.lr is not None:
            raise UserError("--lr belongs to a recipe; give --recipe too, such as --recipe adam")
        return objective, optimizer, facts

    def _entrant(self) -> Entrant | None:
        if self.recipe is None:
            return None
        entrants = parse_entrants(self.recipe)
        if len(entrants) != 1:
            raise UserError(f"--recipe takes one recipe, got {len(entrants)}: {', '.join(e.label for e in entrants)}")
        return entrants[0]

    def _made(self, factory: Any) -> tuple[Objective, Any]:
        """What a user's factory returns, as an objective and an optimizer or None."""
        try:
            made = factory()
        except Exception as error:
            raise UserError(f"{self.target}() failed: {type(error).__name__}: {error}") from error
        if isinstance(made, Objective):
            return made, None
        if isinstance(made, tuple | list):
            match list(made):
                case [Objective() as objective, torch.optim.Optimizer() | None as optimizer]:
                    return objective, optimizer
                case [torch.nn.Module() as model, loss_fn, data]:
                    data = data.get("train") if isinstance(data, dict) else data
                    return Objective(model.to(self.device), loss_fn, _limited(data, self.examples)), None
        what = f"a {type(made).__name__}"
        if isinstance(made, tuple | list):
            what += f" of ({', '.join(type(part).__name__ for part in made)})"
        raise UserError(f"{self.target}() must return {_WANTED}; it returned {what}")

    def _train(self, objective: Objective, optimizer: Any) -> None:
        if not self.steps:
            return
        if optimizer is None:
            raise UserError("--steps needs an optimizer; give --recipe, such as --recipe adam, or return one from the factory")
        model, batches = objective.model, objective.batches
        before = [(module, module.training) for module in model.modules()]
        model.train()
        for step in range(self.steps):
            inputs, targets = batches[step % len(batches)]

            def closure(inputs: Any = inputs, targets: Any = targets) -> Any:
                optimizer.zero_grad()
                loss = objective.loss_fn(model(inputs), targets)
                loss.backward()
                return loss

            try:
                loss = optimizer.step(closure)
            except FloatingPointError as error:
                raise UserError(f"training diverged at step {step + 1}: {error}") from error
            value = float(loss.detach()) if isinstance(loss, torch.Tensor) else float(loss)
            if not math.isfinite(value):
                raise UserError(f"training diverged at step {step + 1}: the loss is {value}; give a smaller --lr")
        for module, training in before:
            module.training = training


def _limited(batches: Any, examples: int) -> list[Any]:
    """The first batches that hold so many examples."""
    found, count = [], 0
    for batch in batches:
        found.append(batch)
        count += len(batch[1]) if isinstance(batch, tuple | list) and len(batch) == 2 and hasattr(batch[1], "__len__") else 1
        if count >= examples:
            break
    return found


def show(found: Diagnosis, console: Console) -> None:
    """The table and the list on the terminal."""
    drawn = Table(title="κ of the layers' extended inputs, the mean of ĥĥᵀ, ĥ = [1; h]", title_justify="left")
    for heading in ("layer", "from"):
        drawn.add_column(heading, overflow="fold")
    for heading in ("inputs", "rank", *(LABELS.get(c, c) for c in found.columns)):
        drawn.add_column(heading, justify="right")
    for heading in ("driven by", "units"):
        drawn.add_column(heading, overflow="fold")
    for layer in found.layers:
        size = layer.spectra.size
        row = [layer.name, layer.source, str(size - layer.biased), f"{layer.spectra.rank}/{size}"]
        row += [number(layer.spectra.kappa(c)) for c in found.columns]
        drawn.add_row(*map(Text, [*row, layer.drivers.main, str(layer.units)]))
    if found.layers:
        console.print(drawn)
    if found.matrix != "none":
        what = "Hessian" if found.matrix == "hessian" else "Gauss–Newton matrix"
        blocks = Table(title=f"κ₊ of blocks of the {what}", title_justify="left")
        for heading in ("layer", "in p", "in z"):
            blocks.add_column(heading, overflow="fold")
        for layer in found.layers:
            blocks.add_row(*map(Text, [layer.name, *block_texts(layer)]))
        console.print(blocks)
    if found.lr is not None and found.lr_limit is not None:
        console.print(f"Learning rate {number(found.lr)}; steps become unstable above {number(found.lr_limit)}")
    console.print(Text(found.verdict))
    for i, a in enumerate(found.advice, 1):
        console.print(Text.assemble((f"{i}. {a.what}", "bold"), f"  ×{number(a.gain)}"))
        console.print(Text(f"   {a.why}"))
        console.print(Text(f"   {a.code}", style="cyan"))
    for note in found.notes:
        console.print(Text(f"Note: {note}."))
