"""The settings of a training, as flags, in a TOML file, and in ``--help``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from precond.lab.workloads.learning_rates import Decay
from precond.lab.workloads.models import Activation, Architecture, Kind, Normalization
from precond.lab.workloads.randomness import check_seed
from precond.lab.workloads.search import LogUniform, Search


def _listed(metavar: str, convert: Callable[[str], Any], kind: type) -> Any:
    """One argument with commas in it."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda args: tuple(convert(item.strip()) for item in args[0].split(",") if item.strip()),
        is_instance=lambda value: isinstance(value, tuple) and all(isinstance(item, kind) for item in value),
        str_from_instance=lambda value: [",".join(f"{item:g}" if kind is float else str(item) for item in value)],
    )


Integers = Annotated[tuple[int, ...], _listed("INT,INT,…", int, int)]
Texts = Annotated[tuple[str, ...], _listed("A,B,…", str, str)]
Numbers = Annotated[tuple[float, ...], _listed("FLOAT,FLOAT,…", float, float)]
Lr = float | Literal["search", "default"]


@dataclass(frozen=True)
class Settings:
    """What every training has. Lists are written with commas: ``--widths 64,64``.

    Attributes:
        data: Data set (digits, wine, breast-cancer, diabetes, fashion-mnist) or your own package.module:factory, a function
            that returns (model, loss_fn, data).
        model: Model for the data sets; logistic is another name of linear.
        widths: Units of the hidden layers, or channels of the convolutions.
        normalization: Of the inputs of each layer.
        activation: Between layers.
        dropout: Probability with which an input of a hidden or last layer is dropped.
        epochs: Passes over the training part.
        steps: Number of steps, in place of epochs.
        batch_size: Largest batch of the data sets (a factory makes its own batches).
        schedule: Learning rate after its warm-up.
        warmup: Steps over which the learning rate rises from 0.
        lr_range: Log-uniform range of the search of the learning rate: lowest, highest.
        trials: Learning rates that every entrant tries; each is trained in full with a seed of its own, and the lowest final
            validation loss wins.
        search_seed: Seed of the search.
        examples: Train on a stratified sample of so many examples.
        data_dir: Folder of the IDX files of fashion-mnist; $FASHION_MNIST, or where Debian's package puts them, if not given.
        split_seed: Seed of the split into training, validation and test parts.
        evaluations: Evaluations of a training, equally spaced.
        target: Validation loss of which the work to reach it is reported; the best of the first entrant that finished (median
            over seeds) and 10 % more if not given.
        threads: Threads of torch. Small models gain nothing by more than one, and lose much where other programs are busy.
        device: Where to train: cpu, cuda, ....
        out: Output folder; one under runs/ that is named by command, data and settings if not given.
        resume: Go on where the same command left off in the output folder; otherwise start all over.
        checkpoint_seconds: Shortest time between two checkpoints.
        config: TOML file of settings by name (batch_size = 128); flags override it.
    """

    data: tyro.conf.Positional[str] = "digits"

    model: Kind = "mlp"
    widths: Integers = (64, 64)
    normalization: Normalization = "none"
    activation: Activation = "relu"
    dropout: float = 0.0

    epochs: float = 30
    steps: int | None = None
    batch_size: int = 64
    schedule: Decay = "cosine"
    warmup: int = 0
    lr_range: Numbers = (1e-4, 10.0)
    trials: int = 8
    search_seed: int = 1000

    examples: int | None = None
    data_dir: Path | None = None
    split_seed: int = 0
    evaluations: int = 40
    target: float | None = None

    threads: int = 1
    device: str = "cpu"
    out: Path | None = None
    resume: bool = True
    checkpoint_seconds: float = 10.0
    config: Path | None = None

    def architecture(self) -> Architecture:
        """The model of a data set."""
        return Architecture(self.model, self.widths, self.normalization, self.activation, self.dropout)

    def space(self) -> LogUniform:
        """Learning rates of a search.

        Raises:
            ValueError: for a range that is none.
        """
        if len(self.lr_range) != 2:
            raise ValueError(f"lr_range: need lowest and highest, such as 1e-4,10; got {','.join(map(str, self.lr_range))}")
        return LogUniform(*self.lr_range)

    def search(self) -> Search:
        """Its budget.

        Raises:
            ValueError: for fewer than one trial.
        """
        return Search(self.trials, self.search_seed)

    def check(self) -> None:
        """Raise ValueError for numbers that cannot work."""
        for name in ("epochs", "steps", "batch_size", "evaluations", "threads", "examples"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be > 0 and finite, got {value}")
        if self.target is not None and not math.isfinite(self.target):
            raise ValueError(f"target must be a finite loss, got {self.target}")
        check_seed("split_seed", self.split_seed)
        check_seed("search_seed", self.search_seed)
        for name in ("warmup", "checkpoint_seconds"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")


# How a command runs, not what comes out of it: these may differ when it is resumed.
RUNNING = ("out", "resume", "checkpoint_seconds", "config")
