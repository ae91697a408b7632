"""What a task of the pool is, before anyone contends in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from precond.lab.workloads.data import Part
from precond.lab.workloads.problem import Tensors

Family = Literal[
    "tabular",
    "autoencoders",
    "conv nets",
    "vision transformers",
    "language models",
    "recurrent nets",
    "PINNs",
    "recommenders",
    "fine-tuning",
]


@dataclass(frozen=True)
class Member:
    """A task of the pool.

    Attributes:
        name: unique in the pool.
        family: with whom its results are averaged.
        steps: of a training at scale 1.
        workload: model and data; data are made once in a process.
    """

    name: str
    family: Family
    steps: int
    workload: Callable[[], Tensors]


def in_parts(whole: Part, sizes: Sequence[int] = (2048, 512, 512)) -> dict[str, Part]:
    """Consecutive examples for training, validation and test. Who makes examples that are not exchangeable splits by himself.

    Raises:
        ValueError: where there are fewer examples.
    """
    if sum(sizes) > len(whole):
        raise ValueError(f"parts of {' + '.join(map(str, sizes))} examples need more than {len(whole)}")
    ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
    indices = torch.arange(len(whole))
    return {name: whole[indices[a:b]] for name, a, b in zip(("train", "validation", "test"), ends[:-1], ends[1:], strict=True)}


def standard(values: Tensor) -> Tensor:
    """Columns of mean 0 and standard deviation 1 (all examples: for data that are drawn, not measured)."""
    return (values - values.mean(0)) / values.std(0)


def uniform(generator: torch.Generator, *shape: int) -> Callable[[float, float], Tensor]:
    """Draws numbers between two bounds, of one shape."""
    return lambda low, high: low + (high - low) * torch.rand(shape, generator=generator)


def scaled(parts: Mapping[str, Part], numbers: int) -> dict[str, Part]:
    """With the first so many columns of the inputs at mean 0 and standard deviation 1 on the training part."""
    std, mean = torch.std_mean(parts["train"].inputs[:, :numbers], 0)
    return {
        name: Part(torch.cat([(part.inputs[:, :numbers] - mean) / std, part.inputs[:, numbers:]], 1), part.targets)
        for name, part in parts.items()
    }
