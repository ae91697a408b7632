"""What ranks must decide alike: run on each of them by :class:`distributed.pool.Pool`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distributed.training import Setting, build, contents, fit
from precond import BNP, RMS, SAM, GradientNorm, LossClosure, PreconditionedGD, Whitening


@contextmanager
def counted_calls() -> Iterator[list[int]]:
    """Grows by one with each call of ``all_reduce``."""
    original, made = dist.all_reduce, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(1)
        return original(*args, **kwargs)

    dist.all_reduce = counted
    try:
        yield made
    finally:
        dist.all_reduce = original


def calls_per_step(setting: Setting, steps: int) -> list[int]:
    """How many times the optimizer calls ``all_reduce`` in each step."""
    model, optimizer = build(setting, dist.get_rank())
    counts = []
    for k in range(steps):
        x = torch.randn(64, 4, 5, dtype=setting.dtype, generator=torch.Generator().manual_seed(k))
        with counted_calls() as made:
            optimizer.step(LossClosure(lambda x=x: model(x).square().mean()))
        counts.append(len(made))
    return counts


def calls_of_a_skipped_step() -> int:
    """Fused kernels look at the inputs first, and leave the step to the loop where they are bad."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(3, 2))
    optimizer = PreconditionedGD(model, 0.05, preconditioner=BNP())
    x = torch.ones(4, 3)
    x[0, 0] = torch.inf
    model(x).sum().backward()
    with counted_calls() as made:
        optimizer.step()
    assert optimizer.last.skipped
    return len(made)


MODELS = {
    "width": lambda rank: nn.Sequential(nn.Linear(3 + rank, 4)),
    "another layer": lambda rank: nn.Sequential(nn.Linear(3, 4), *([nn.Linear(4, 4)] if rank else [])),
    "other names": lambda rank: nn.ModuleDict({"ab"[rank]: nn.Linear(3, 4)}),
    "no layer on one rank": lambda rank: nn.LayerNorm(4) if rank else nn.Linear(3, 4),
}


def different_models(name: str) -> None:
    PreconditionedGD(MODELS[name](dist.get_rank()), preconditioner=BNP())


CHOICES = {
    "BNP": lambda: {"preconditioner": BNP()},
    "BNP, loop": lambda: {"preconditioner": BNP(), "engine": "loop"},
    "BNP @ RMS": lambda: {"preconditioner": BNP() @ RMS()},
    "RMS": lambda: {"preconditioner": RMS()},
    "SAM": lambda: {"preconditioner": BNP() @ RMS(), "regularizers": [SAM(0.1)]},
    "gradient norm": lambda: {"preconditioner": BNP(), "regularizers": [GradientNorm(0.01)]},
    "exact": lambda: {"preconditioner": BNP(), "regularizers": [GradientNorm(0.01, method="exact")]},
    "Whitening": lambda: {"preconditioner": Whitening()},
}


def _small(choice: str, nonfinite: str) -> tuple[nn.Module, PreconditionedGD]:
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)))
    return model, PreconditionedGD(model, 0.05, nonfinite=nonfinite, **CHOICES[choice]())


def _snapshot(model: nn.Module, optimizer: PreconditionedGD) -> list[Tensor]:
    return [t for part in contents(model, optimizer).values() for t in part.values()]


def bad_on_one_rank(choice: str, nonfinite: str, what: str) -> dict[str, Any]:
    """One step of three is bad on rank 1 alone: its loss, its gradient or its inputs."""
    model, optimizer = _small(choice, nonfinite)
    rank, out = dist.get_rank(), {}
    for k in range(3):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(10 * k + rank))
        bad = k == 1 and rank == 1
        if bad and what == "inputs":
            x[0, 0] = torch.inf

        def loss(x=x, bad=bad) -> Tensor:
            value = model(x).square().mean()
            if bad and what == "gradient":
                return value * torch.nan
            return value + (torch.inf if bad and what == "loss" else 0.0)

        before = _snapshot(model, optimizer)
        raised = None
        try:
            optimizer.step(LossClosure(loss))
        except FloatingPointError as error:
            raised = str(error)
        if k == 1:
            same = all(torch.equal(s, t) for s, t in zip(before, _snapshot(model, optimizer), strict=True))
            out = {"unchanged": same, "skipped": optimizer.last.skipped, "raised": raised}
    return {**out, "end": _snapshot(model, optimizer)}


def overflow_on_one_rank(choice: str) -> dict[str, Any]:
    """Local gradients (no_sync) of which one overflows: the scalers see it on one rank alone."""
    model, optimizer = _small(choice, "propagate")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    rank = dist.get_rank()
    before = _snapshot(model, optimizer)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    with model.no_sync():
        (scaler.scale(model(x).square().mean()) * (1e38 if rank == 1 else 1.0)).backward()
        while optimizer.probe(grad_scale=scaler.get_scale()):
            scaler.scale(model(x).square().mean()).backward()
    scaler.step(optimizer)
    same = all(torch.equal(s, t) for s, t in zip(before, _snapshot(model, optimizer), strict=True))
    return {"unchanged": same, "skipped": optimizer.last.skipped}


def locally_perturbed() -> list[Tensor]:
    """SAM with a perturbation of each rank's own: the first backward under no_sync, the second one reduced."""
    model, optimizer = _small("gradient norm", "propagate")
    optimizer = PreconditionedGD(model, 0.05, preconditioner=BNP(), regularizers=[SAM(0.1)])
    for k in range(3):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(10 * k + dist.get_rank()))
        with model.no_sync():
            model(x).square().mean().backward()
        while optimizer.probe():
            model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return _snapshot(model, optimizer)


def resumed(setting: Setting) -> tuple[dict[str, Any], dict[str, Any]]:
    """A training, and the same one with a state dict in the middle."""
    rank = dist.get_rank()
    whole = build(setting, rank)
    fit(setting, *whole, rank)
    first = {"model": whole[0].state_dict(), "optimizer": whole[1].state_dict()}
    twin = build(setting, rank)
    fit(setting, *twin, rank, first=20)
    twin[0].load_state_dict(first["model"])
    twin[1].load_state_dict(first["optimizer"])
    fit(setting, *whole, rank, first=10)
    fit(setting, *twin, rank, first=10)
    return contents(*whole), contents(*twin)
