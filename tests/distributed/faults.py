"""Ranks that end, are late or have nothing to step: run on each rank by :class:`distributed.pool.Pool`."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distributed.training import Setting, build, fit
from precond import PreconditionedGD, adamw, auto, soap
from precond.optim.ranks import replicas

TIMEOUT = 2  # seconds, of a group


@contextmanager
def failing(name: str, fault: Callable[[], None]) -> Iterator[None]:
    """A collective before which something happens to this rank."""
    original = getattr(dist, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        fault()
        return original(*args, **kwargs)

    setattr(dist, name, call)
    try:
        yield
    finally:
        setattr(dist, name, original)


def _outcome(step: Callable[[], Any]) -> tuple[float, str]:
    """The seconds that it took, and what it raised."""
    start = time.monotonic()
    try:
        step()
        text = "nothing"
    except RuntimeError as error:
        text = str(error)
    return time.monotonic() - start, text


def killed(optimizer: str, wrap: str, collective: str) -> tuple[float, str]:
    """In the third step the last rank is killed before one of the optimizer's collectives."""
    rank, world = dist.get_rank(), dist.get_world_size()
    setting = Setting(optimizer, (4,) * world, wrap=wrap, steps=2)
    model, opt = build(setting, rank)
    fit(setting, model, opt, rank)
    model(torch.ones(2, 4, 5, dtype=setting.dtype)).square().mean().backward()
    if rank < world - 1:
        return _outcome(opt.step)
    with failing(collective, lambda: os.kill(os.getpid(), signal.SIGKILL)):
        opt.step()
    raise AssertionError(f"{collective} is not called")


def _pair(recipe: Callable[[nn.Module], PreconditionedGD], group: Any = None) -> tuple[nn.Module, PreconditionedGD]:
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), process_group=group)
    optimizer = recipe(model)
    return model, optimizer


def late() -> tuple[float, str]:
    """A rank that comes after the timeout of the group."""
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT))
    model, optimizer = _pair(soap, group)
    model(torch.ones(2, 3)).square().mean().backward()
    with failing("all_to_all_single", lambda: time.sleep(2 * TIMEOUT if dist.get_rank() else 0)):
        found = _outcome(optimizer.step)
    dist.barrier()
    return found


def slow() -> bool:
    """One that comes before it."""
    group = dist.new_group(timeout=timedelta(seconds=20 * TIMEOUT))
    ends = []
    for seconds in (0.0, 0.3):
        model, optimizer = _pair(soap, group)
        with failing("all_to_all_single", lambda seconds=seconds: time.sleep(seconds if dist.get_rank() else 0)):
            for k in range(3):
                optimizer.zero_grad()
                model(torch.full((2, 3), k + 1.0)).square().mean().backward()
                optimizer.step()
        ends.append([p.detach().clone() for p in model.parameters()])
    return all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def without_gradient(everywhere: bool) -> str:
    """A step for which a rank, or none, has gone backward."""
    model, optimizer = _pair(soap)
    if dist.get_rank() == 0 and not everywhere:
        with model.no_sync():
            model(torch.ones(2, 3)).square().mean().backward()
    before, replicas.WAIT = replicas.WAIT, 1.0
    try:
        if dist.get_rank() == 0 and not everywhere:
            return "it would wait for the other"
        return _outcome(optimizer.step)[1]
    finally:
        replicas.WAIT = before
        dist.barrier()


def joined(recipe: str) -> str:
    """DDP's way to go on where some ranks have no batches left."""
    model, optimizer = _pair({"adamw": adamw, "auto": auto, "soap": soap}[recipe])
    with model.join():
        model(torch.ones(2, 3)).square().mean().backward()
        return _outcome(optimizer.step)[1]


def more_ranks_than_layers() -> tuple[list[float], list[float]]:
    """One layer, whose owner alone steps it, before and after a step whose gradient holds NaN: what all ranks then have."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(3, 4, bias=False))
    optimizer = soap(model, nonfinite="skip")
    ends = []
    for x in (1.0, float("nan")):
        optimizer.zero_grad()
        model(torch.full((2, 3), x)).square().mean().backward()
        optimizer.step()
        ends.append(next(model.parameters()).detach().flatten().tolist())
    return ends[0], ends[1]
