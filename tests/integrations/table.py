"""The recipes that every framework runs, a net for them, and the plain loop that frameworks are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import precond
from precond import BNP, SAM, PreconditionedGD

Batch = tuple[Tensor, Tensor]

RECIPES: dict[str, Callable[..., PreconditionedGD]] = {
    "adamw": lambda p, **more: precond.adamw(p, lr=0.01, **more),
    "auto": lambda p, **more: precond.auto(p, lr=0.01, **more),
    "muon": lambda p, **more: precond.muon(p, lr=0.01, **more),
    "soap": lambda p, **more: precond.soap(p, lr=0.01, **more),
    "whitening": lambda p, **more: precond.whitening(p, lr=0.01, **more),
    "adam(inputs=BNP())": lambda p, **more: precond.adam(p, lr=0.01, inputs=BNP(), **more),
    "SAM in z": lambda p, **more: precond.adamw(p, lr=0.01, regularizers=[SAM(0.05)], **more),
}


def net(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Hidden matrices, and running statistics that a second pass or a wrong order of passes would spoil."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)
    ).to(dtype)  # fmt: skip


def batches(count: int = 8, dtype: torch.dtype = torch.float64) -> list[Batch]:
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(8, 6, generator=generator, dtype=torch.float64).to(dtype), torch.randint(3, (8,), generator=generator))
        for _ in range(count)
    ]


loss_fn = nn.functional.cross_entropy


def loop(
    model: nn.Module,
    optimizer: PreconditionedGD,
    data: Iterable[Batch],
    accumulate: int = 1,
    clip: float | None = None,
    scheduler: Any = None,
    autocast: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    loss: Callable[[nn.Module, Any], Tensor] = lambda model, batch: loss_fn(model(batch[0]), batch[1]),
) -> None:
    """Written out: all micro-batches in each pass, then clipping, then the step."""
    scaled = (lambda t: t) if scaler is None else scaler.scale
    for window in windows(list(data), accumulate):

        def backward(window: Sequence[Batch] = window) -> None:
            for batch in window:
                with nullcontext() if autocast is None else torch.autocast("cpu", autocast):
                    found = loss(model, batch)
                scaled(found / accumulate).backward()

        optimizer.zero_grad()
        backward()
        while optimizer.probe(None if scaler is None else scaler.get_scale()):
            backward()
        if clip is not None:
            if scaler is not None:
                scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        if scheduler is not None:
            scheduler.step()


def windows(data: list[Batch], size: int) -> list[list[Batch]]:
    return [data[i : i + size] for i in range(0, len(data), size)]


def check_same(a: nn.Module, b: nn.Module) -> None:
    """Parameters and buffers: the same operations in the same order, in float64 but for float32 under autocast."""
    ours, theirs = a.state_dict(), b.state_dict()
    assert list(ours) == list(theirs)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def check_state(a: PreconditionedGD, b: PreconditionedGD) -> None:
    """Optimizer states: the same entries with the same values."""
    ours, theirs = a.state_dict()["state"], b.state_dict()["state"]
    for key, entries in ours.items():
        assert entries.keys() == theirs[key].keys()
        for name, value in entries.items():
            torch.testing.assert_close(value, theirs[key][name], rtol=1e-6, atol=1e-9)
