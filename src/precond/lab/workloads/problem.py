"""What one training starts from: a model, its loss, and its data in parts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from precond.lab.workloads.batches import Batches, TensorBatches
from precond.lab.workloads.data import DataSet, Part
from precond.lab.workloads.models import Architecture

Metric = Literal["accuracy", "R²"]
LossFn = Callable[[Any, Tensor], Tensor]

EVALUATED_TRAINING_EXAMPLES = 10_000
"""The training loss is that of so many training examples at most, always the same ones."""


@dataclass(frozen=True, eq=False)
class Problem:
    """A fresh model and what it is trained on.

    Attributes:
        model: on its device.
        loss_fn: (outputs, targets) ↦ mean loss.
        parts: ``"train"``, and where there are any ``"validation"`` and ``"test"``; ``"search"`` trains as ``"train"`` does and is
            evaluated on other training examples, for choices that must not be made on what is reported.
        metric: what is reported beside the loss, or None.
    """

    model: nn.Module
    loss_fn: LossFn
    parts: Mapping[str, Batches]
    metric: Metric | None


class Workload(ABC):
    """A named source of problems that differ by the random generators alone."""

    name: str
    about: str

    @abstractmethod
    def problem(self) -> Problem:
        """A fresh problem, initialized from the global generators."""

    @property
    @abstractmethod
    def facts(self) -> Mapping[str, str]:
        """What a report says about the data and the model."""


def in_batches(parts: Mapping[str, Part], size: int, evaluated: int | None = None) -> dict[str, Batches]:
    """Parts of a data set in batches, and with them the part ``"search"``.

    Args:
        parts: ``"train"``, and where there are any ``"validation"`` and ``"test"``.
        size: largest batch in training.
        evaluated: evaluate on so many examples of the training and of the validation part at most; None: on 10,000 of training
            and all of validation. Where the training part does not hold twice as many, ``"search"`` is evaluated on the same.
    """
    limit = evaluated or EVALUATED_TRAINING_EXAMPLES
    limits = {"train": limit, "validation": evaluated}
    found: dict[str, Batches] = {name: TensorBatches(part, size, limits.get(name)) for name, part in parts.items()}
    return {**found, "search": TensorBatches(parts["train"], size, limit, skipped=limit)}


@dataclass(frozen=True, eq=False)
class BuiltIn(Workload):
    """A data set of this package and a model from a definition.

    Classification is by cross entropy and reports the accuracy; regression is by mean squared error and reports R².

    Args:
        data: in parts.
        architecture: of the model.
        batch_size: largest batch in training.
        device: where it is trained.
        evaluated: curves are those of so many examples of the training and of the validation part at most, always the same
            ones; None: 10,000 of training and all of validation.

    Raises:
        ValueError: for a model that does not fit the data.
    """

    data: DataSet
    architecture: Architecture
    batch_size: int
    device: str = "cpu"
    evaluated: int | None = None

    def __post_init__(self) -> None:
        if self.architecture.kind == "logistic" and self.data.task == "regression":
            raise ValueError(f"model 'logistic' is for classes, and {self.data.name} is regression; use model 'linear'")
        if self.batch_size < 1:
            raise ValueError(f"batch size must be at least 1, got {self.batch_size}")
        smallest = len(self.data.parts["train"]) // -(-len(self.data.parts["train"]) // self.batch_size)
        if self.architecture.normalization == "batch" and smallest < 2:
            raise ValueError(f"batch normalization needs at least 2 examples in a batch, got batch size {self.batch_size}")

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.data.name

    @property
    def about(self) -> str:  # type: ignore[override]
        return self.data.about

    def problem(self) -> Problem:
        model = self.architecture.build(self.data.input_shape, self.data.outputs).to(self.device)
        parts = in_batches(self.data.parts, self.batch_size, self.evaluated)
        loss_fn = F.cross_entropy if self.data.task == "classification" else F.mse_loss
        return Problem(model, loss_fn, parts, self.metric)

    @property
    def metric(self) -> Metric:
        """What is reported beside the loss."""
        return "accuracy" if self.data.task == "classification" else "R²"

    @property
    def facts(self) -> Mapping[str, str]:
        sizes = ", ".join(f"{len(part)} {name}" for name, part in self.data.parts.items())
        a = self.architecture
        hidden = "" if a.kind in ("linear", "logistic") else f" {'-'.join(map(str, a.widths))}, {a.activation}"
        return {
            "data": self.data.about,
            "examples": sizes,
            "model": f"{a.kind}{hidden}, normalization {a.normalization}, dropout {a.dropout:g}",
            "loss": "cross entropy" if self.data.task == "classification" else "mean squared error",
        }


@dataclass(frozen=True, eq=False)
class Tensors(Workload):
    """Examples in memory, and any model and loss.

    Args:
        name, about: of the data.
        parts: ``"train"``, ``"validation"`` and ``"test"``.
        make: () ↦ a fresh model.
        loss_fn: (outputs, targets) ↦ mean loss.
        metric: what is reported beside the loss, or None.
        batch_size: largest batch in training.
        evaluated: curves are those of so many examples of the training and of the validation part at most.
        model, loss: in words.
    """

    name: str
    about: str
    parts: Mapping[str, Part]
    make: Callable[[], nn.Module]
    loss_fn: LossFn
    metric: Metric | None
    batch_size: int
    evaluated: int
    model: str
    loss: str

    def problem(self) -> Problem:
        return Problem(self.make(), self.loss_fn, in_batches(self.parts, self.batch_size, self.evaluated), self.metric)

    @property
    def facts(self) -> Mapping[str, str]:
        sizes = ", ".join(f"{len(part)} {name}" for name, part in self.parts.items())
        return {"data": self.about, "examples": sizes, "model": self.model, "loss": self.loss}
