"""How a training went."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

Status = Literal["finished", "diverged", "failed"]


@dataclass
class Curve:
    """Columns of equal length, one entry per evaluation; the first is before the first step.

    Attributes:
        step: steps done.
        gradients: gradient evaluations done.
        seconds: seconds of training done, evaluation excluded.
        cpu_seconds: processor time of the same, which other programs on the machine do not count in.
        train_loss, train_metric: on (a fixed sample of) the training part.
        validation_loss, validation_metric: on the validation part; empty where there is none.
    """

    step: list[int] = field(default_factory=list)
    gradients: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    train_metric: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    validation_metric: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        lengths = {name: len(column) for name, column in self.columns().items()}
        for name, length in lengths.items():
            if length != lengths["step"] and not (name.startswith("validation") and length == 0):
                raise ValueError(f"a curve of {lengths['step']} evaluations has {length} values of {name}")

    def columns(self) -> dict[str, list[float]]:
        """All columns by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass
class Outcome:
    """One training.

    Attributes:
        seed: of its random generators.
        lr: its peak learning rate.
        curve: its evaluations.
        status: ``"finished"``; ``"diverged"``: a loss or a gradient was inf or NaN; ``"failed"``: it raised an error.
        diverged_at: the step of which that was so.
        error: what it raised.
        test_loss, test_metric: after the last step; None where there is no test part, in a search, or where it did not finish.
        rounds: of how many equal trainings its seconds are the medians.
    """

    seed: int
    lr: float
    curve: Curve
    status: Status = "finished"
    diverged_at: int | None = None
    error: str | None = None
    test_loss: float | None = None
    test_metric: float | None = None
    rounds: int = 1
