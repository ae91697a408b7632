"""What ``diagnose`` and ``lr-range`` look at: a data set with a model, or what a user's function returns."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from precond.analysis.curvature import Objective
from precond.analysis.diagnostics.problem import as_objective, first_batches
from precond.lab.cli.errors import UserError
from precond.lab.cli.settings import Integers
from precond.lab.workloads import Entrant, load_workload, parse_entrants
from precond.lab.workloads.factory import import_factory
from precond.lab.workloads.models import Activation, Architecture, Kind, Normalization

_WANTED = "an Objective, (objective, optimizer), (model, data), or (model, loss_fn, data)"


@dataclass(frozen=True)
class Target:
    """A model with its data, and an optimizer.

    Attributes:
        target: Data set (digits, wine, breast-cancer, diabetes, fashion-mnist), or your own package.module:factory, a function
            without arguments that returns an Objective, (objective, optimizer), (model, loss_fn, data), or (model, data) where the model
            returns its loss (Hugging Face) or is a LightningModule; data is a loader of pairs or of dicts.
        recipe: Optimizer, as in precond train: adam, "adam(inputs=BNP())"; plain gradient descent if not given. A factory may return its
            own instead.
        lr: Learning rate of the recipe; its default if not given.
        examples: Look at the first batches that hold so many training examples.
        batch_size: Of the steps.
        model: Model for the data sets.
        widths: Units of the hidden layers, or channels of the convolutions.
        normalization: Of the inputs of each layer.
        activation: Between layers.
        data_dir: Folder of the IDX files of fashion-mnist; $FASHION_MNIST, or where Debian's package puts them, if not given.
        seed: Of the model and of dropout.
        threads: Threads of torch.
        device: Where to compute: cpu, cuda, ....
    """

    target: tyro.conf.Positional[str] = "digits"
    recipe: str | None = None
    lr: float | None = None
    examples: int = 5000
    batch_size: int = 64

    model: Kind = "mlp"
    widths: Integers = (64, 64)
    normalization: Normalization = "none"
    activation: Activation = "relu"
    data_dir: Path | None = None

    seed: int = 0
    threads: int = 1
    device: str = "cpu"

    def problem(self) -> tuple[Objective, Any, dict[str, str]]:
        """The objective, the optimizer or None, and facts."""
        entrant = self.entrant()
        if ":" in self.target:
            # A console script does not look in the current folder by itself.
            sys.path.insert(0, os.getcwd())
            objective, optimizer = self._made(import_factory(self.target))
            self._try(objective)
            facts = {"data": f"what {self.target} returns"}
        else:
            architecture = Architecture(self.model, self.widths, self.normalization, self.activation)
            workload = load_workload(
                self.target, architecture, batch_size=self.batch_size, device=self.device, folder=self.data_dir
            )
            problem = workload.problem()
            batches = first_batches(problem.parts["train"].epoch(0), self.examples)
            objective = Objective(problem.model, problem.loss_fn, batches)
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

    def entrant(self) -> Entrant | None:
        """The recipe, where there is one."""
        if self.recipe is None:
            return None
        entrants = parse_entrants(self.recipe)
        if len(entrants) != 1:
            raise UserError(f"--recipe takes one recipe, got {len(entrants)}: {', '.join(e.label for e in entrants)}")
        return entrants[0]

    def _try(self, objective: Objective) -> None:
        """Raise where the loss of a batch does: an error of the user's own code."""
        for index in range(len(objective.batches)):
            try:
                with objective.measuring(index), torch.no_grad():
                    objective.evaluate(index)
            except Exception as error:
                first, which = str(error).strip().split("\n")[0], "its first batch" if index == 0 else f"batch {index}"
                raise UserError(f"{self.target}: the loss of {which} failed: {type(error).__name__}: {first}") from error

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
                    return self._objective(model, data, loss_fn), None
                case [torch.nn.Module() as model, data]:
                    return self._objective(model, data, None), None
        what = f"a {type(made).__name__}"
        if isinstance(made, tuple | list):
            what += f" of ({', '.join(type(part).__name__ for part in made)})"
        raise UserError(f"{self.target}() must return {_WANTED}; it returned {what}")

    def _objective(self, model: torch.nn.Module, data: Any, loss_fn: Any) -> Objective:
        data = data.get("train") if isinstance(data, dict) else data
        try:
            return as_objective(model.to(self.device), data, loss_fn, self.examples)
        except (TypeError, ValueError, NotImplementedError) as error:
            # Of the function by whose name the message goes, which is not the command.
            raise UserError(f"{self.target}: {str(error).removeprefix('diagnose: ')}") from error
