"""What a data set is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from precond.lab.workloads.splits import split, strata

Task = Literal["classification", "regression"]


@dataclass(frozen=True, eq=False)
class Part:
    """Examples: inputs (N, ...) in float32; targets (N,) int64 classes, or (N, 1) float32 values."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, indices: Tensor) -> Part:
        return Part(self.inputs[indices], self.targets[indices])

    def to(self, device: str) -> Part:
        """The same examples on a device."""
        return Part(self.inputs.to(device), self.targets.to(device))


@dataclass(frozen=True, eq=False)
class DataSet:
    """A data set in parts.

    Attributes:
        name: as the command line calls it.
        task: ``"classification"`` or ``"regression"``.
        parts: ``"train"``, ``"validation"`` and ``"test"``.
        outputs: number of classes, or 1.
        about: one sentence on what the numbers are and how they were split.
    """

    name: str
    task: Task
    parts: Mapping[str, Part]
    outputs: int
    about: str

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return tuple(self.parts["train"].inputs.shape[1:])

    def limited(self, examples: int, seed: int) -> DataSet:
        """With a stratified sample of the training part in its place.

        Raises:
            ValueError: where the training part has fewer examples.
        """
        train = self.parts["train"]
        if not 0 < examples <= len(train):
            raise ValueError(
                f"examples must lie between 1 and the {len(train)} training examples of {self.name}, got {examples}"
            )
        kept = split(strata(train.targets), {"train": examples / len(train)}, seed)["train"]
        about = f"{self.about} Of the training part, a stratified sample of {len(kept)} examples is used."
        return replace(self, parts={**self.parts, "train": train[kept]}, about=about)

    def to(self, device: str) -> DataSet:
        """The same data set on a device."""
        return replace(self, parts={name: part.to(device) for name, part in self.parts.items()})


def parts_of(whole: Part, fractions: Mapping[str, float], seed: int) -> dict[str, Part]:
    """A stratified split of examples."""
    return {name: whole[indices] for name, indices in split(strata(whole.targets), fractions, seed).items()}


def standardized(parts: Mapping[str, Part]) -> dict[str, Part]:
    """With targets of mean 0 and standard deviation 1 on the training part: predicting the mean has a squared error of 1."""
    std, mean = torch.std_mean(parts["train"].targets, correction=0)
    return {name: Part(part.inputs, (part.targets - mean) / std) for name, part in parts.items()}
