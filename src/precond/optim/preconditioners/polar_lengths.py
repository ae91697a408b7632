"""How long the steps of :class:`~precond.Polar` are, by what is known of a layer: its samples, its first parameters, and L."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import TypeVar

import torch
from torch import Tensor

from precond.optim.blocks import Stack, State
from precond.optim.inputs import Moments, Request
from precond.optim.inputs.moments import REQUESTS

AnyNumber = TypeVar("AnyNumber", float, Tensor)


def count_samples(state: State, inputs: Mapping[tuple[str, Request], Moments] | None) -> None:
    """Keep in ``size`` the largest number N of samples that a step has shown of each layer; 0: not known."""
    members = state.block.members if isinstance(state.block, Stack) else (state.block,)
    for member, size in zip(members, state["size"].reshape(-1), strict=True):
        seen = map((inputs or {}).get, product((site.name for site in member.leaves[0].sites), REQUESTS))
        largest = max((max(found.count.tolist()) for found in seen if found is not None), default=0.0)
        if largest > size.item():
            size.fill_(largest)


def exact(N: float, shape: Sequence[int]) -> bool:
    """Whether a root of n rows, 3000n² + 5n³ operations by the clock, costs no more than the layer's three products, 6NAB."""
    A, B = shape
    n = min(A, B)
    return 3000 * n**2 + 5 * n**3 <= 6 * N * A * B


def spread(N: float, shape: Sequence[int]) -> float:
    """(n/min(A, n))^(1/4), n = min(B, N), of a layer that sees N samples; 1 where N is not known."""
    A, B = shape
    n = min(B, N)
    return (n / min(A, n)) ** 0.25 if n else 1.0


def is_fresh(state: State) -> bool:
    """Whether nothing was observed yet of some layer: at the first step, and where a bias was frozen or thawed later."""
    return not bool(state["gram"].diagonal(dim1=-2, dim2=-1).any(-1).all())


def measure(state: State, z: Tensor, p: Tensor, where: Tensor) -> None:
    """Keep ℓ = max(‖z₀‖/√A, min(1, √σ)), σ = ‖z₀‖/‖p₀‖, of some layers; 1 for zeros, which tell nothing."""
    of_z, of_p = (torch.linalg.vector_norm(x, 2, (-2, -1)) for x in (z, p))
    sigma = torch.where(of_z > 0, of_z / of_p, 1.0)
    found = torch.maximum(of_z / z.shape[-2] ** 0.5, sigma.sqrt().clamp_max(1.0))
    state["length"].copy_(torch.where(where, found, state["length"]))


def step_length(rank: AnyNumber, length: AnyNumber, times: AnyNumber, shape: Sequence[int], gain: float) -> AnyNumber:
    """The length γ√ρ of a step, from ρ, from how long the rows of the parameters were, and from :func:`spread`."""
    A, B = shape
    return rank**0.5 * length * times * (gain * (A / B) ** 0.5)


def lengths(state: State, shape: Sequence[int], gain: float) -> Tensor:
    """The length of a step of each layer."""
    first, *others = (spread(N, shape) for N in state["size"].tolist())
    rank, alike = state["rank"], all(x == first for x in others)  # then the device need not be told of it
    times = first if alike else torch.tensor([first, *others], dtype=rank.dtype).to(rank.device)
    return step_length(rank, state["length"], times, shape, gain)
