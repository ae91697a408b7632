"""A training whose steps differ: run on each rank by :class:`distributed.pool.Pool`, or by one process alone on all samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from distributed.training import full
from precond import RMS, SAM, Auto, PreconditionedGD, auto, bnp, muon, soap, whitening
from precond.algebra.sharding import copy_
from precond.optim.optimizer.parameters import ModuleGroups

WIDTH, STEPS = 12, 10
SAMPLES = [(3, 3), (3, 3), (20, 4), (0, 6), (4, 0), (3, 9), (30, 30), (3, 3), (5, 3), (3, 3)]
"""Of each step those of either rank: fewer than half the features are sent as they are, of more a triangle."""

CHANGES: dict[str, Callable[[nn.Module, PreconditionedGD, int], None]] = {
    "samples": lambda model, opt, k: None,
    "a layer frozen and thawed": lambda model, opt, k: model[2].requires_grad_(k not in (2, 3, 4)),
    "a rate of its own": lambda model, opt, k: opt.param_groups[1].update(lr=0.01 if k < 3 else 0.02),
    "the sign": lambda model, opt, k: [group.update(maximize=k == 4) for group in opt.param_groups],
    "a state that is loaded": lambda model, opt, k: opt.load_state_dict(opt.state_dict()) if k in (1, 3) else None,
    "gradients that are not finite": lambda model, opt, k: None,
}
RECIPES: dict[str, Callable[..., PreconditionedGD]] = {
    "auto": lambda groups, **more: auto(groups, lr=0.01, **more),
    "whitening": lambda groups, **more: whitening(groups, lr=0.01, eps=1e-3, weight_decay=0.1, **more),
}


def _net(wrap: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)), nn.Linear(WIDTH, 5, bias=False)).double()
    if not dist.is_initialized():
        return plain, plain
    if wrap == "ddp":
        return plain, DistributedDataParallel(plain, find_unused_parameters=True)
    world = dist.get_world_size()
    copies = {"mesh_dim_names": ("copies", "parts")} if wrap == "hsdp" else {}
    mesh = init_device_mesh("cpu", (2, world // 2) if copies else (world,), **copies)
    for layer in plain:
        fully_shard(layer, mesh=mesh)
    return plain, fully_shard(plain, mesh=mesh)


def trained(recipe: str, wrap: str, change: str) -> list[Tensor]:
    """The parameters at the end."""
    plain, model = _net(wrap)
    groups: Any = model
    if change == "a rate of its own":
        own = set(plain[1].parameters())
        parted = [[(n, p) for n, p in model.named_parameters() if (p in own) is there] for there in (False, True)]
        groups = ModuleGroups([{"params": of} for of in parted], model)
    optimizer = RECIPES[recipe](groups, nonfinite="skip")
    world = dist.get_world_size() if dist.is_initialized() else 1
    for k in range(STEPS):
        CHANGES[change](plain, optimizer, k)
        sizes = SAMPLES[k]
        x = torch.randn(sum(sizes), WIDTH, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        if change == "gradients that are not finite" and k in (0, 5):
            x[-1, -1] = torch.inf  # one rank's
        mine = x.split(list(sizes))[dist.get_rank()] if dist.is_initialized() else x
        optimizer.zero_grad()
        (world * model(mine).square().sum() / sum(sizes)).backward()
        optimizer.step()
    return [p.full_tensor().detach() if isinstance(p, DTensor) else p.detach().clone() for p in plain.parameters()]


def probed(recipe: str, wrap: str) -> list[Tensor]:
    """The parameters after steps with SAM, of which a bias has missed the first."""
    plain, model = _net(wrap)
    optimizer = RECIPES[recipe](model, regularizers=[SAM(0.05)])
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for k in range(3):
        plain[1].bias.requires_grad_(k > 0)
        x = torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(k), dtype=torch.float64).chunk(world)[rank]
        optimizer.zero_grad()
        model(x).square().sum(1).mean().backward()
        while optimizer.probe():
            model(x).square().sum(1).mean().backward()
        optimizer.step()
    return [full(p) for p in plain.parameters()]


OTHERS = RECIPES | {
    # A bias that is stepped alone begins anew by the size of its gradient, which here and there is rounding noise.
    "auto": lambda groups: auto(groups, lr=0.01, choice=Auto(rms=RMS(0.999, eps=1e-3))),
    "soap": lambda groups: soap(groups, lr=0.01, eps=1e-3, precondition_frequency=2),
    "muon": lambda groups: muon(groups, lr=0.01, arithmetic="full"),
    "bnp": lambda groups: bnp(groups, lr=0.01),
}
TRAINS: list[Callable[[int], bool]] = [lambda k: k != 2, lambda k: k < 2, lambda k: k >= 2, lambda k: k % 3 == 1]
"""Of each layer with a bias, in which steps one of its two parameters trains; the other one always does."""


Contents = tuple[list[Tensor], dict[int, dict[str, Any]]]
"""Whole parameters and state."""


def contents(plain: nn.Module, optimizer: PreconditionedGD) -> Contents:
    """As every rank is told of them."""
    state = {
        i: {key: full(t) if isinstance(t, Tensor) else t for key, t in entries.items()}
        for i, entries in optimizer.state_dict()["state"].items()
    }
    return [full(p) for p in plain.parameters()], state


def _steps(pair: tuple[nn.Module, nn.Module], optimizer: PreconditionedGD, steps: range, which: str) -> None:
    """Some steps in which weights or biases train by :data:`TRAINS`, on shares of one batch."""
    plain, model = pair
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for k in steps:
        for layer, trains in zip(plain, TRAINS, strict=False):
            getattr(layer, which).requires_grad_(trains(k))
        x = torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        optimizer.zero_grad()
        model(x.chunk(world)[rank]).square().sum(1).mean().backward()
        optimizer.step()


def partly_without_gradient(recipe: str, wrap: str, which: str) -> Contents:
    """Parameters and state after the same steps where parameters are not frozen, and have no gradient."""
    (plain, model), (rank, world) = _net(wrap), (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    optimizer = OTHERS[recipe](model)
    for k in range(9):
        x = torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        optimizer.zero_grad()
        model(x.chunk(world)[rank]).square().sum(1).mean().backward()
        for layer, trains in zip(plain, TRAINS, strict=False):
            if not trains(k):
                getattr(layer, which).grad = None
        optimizer.step()
    return contents(plain, optimizer)


def partly_frozen(recipe: str, wrap: str, which: str) -> Contents:
    """Parameters and state after steps in which layers train in parts; in the last one some are frozen."""
    pair = _net(wrap)
    optimizer = OTHERS[recipe](pair[1])
    _steps(pair, optimizer, range(9), which)
    return contents(pair[0], optimizer)


def saved_frozen(recipe: str, wrap: str, path: str) -> Contents:
    """Saved after step 3, where half of the weights are frozen; what comes of going on."""
    pair = _net(wrap)
    optimizer = OTHERS[recipe](pair[1])
    _steps(pair, optimizer, range(3), "weight")
    found, groups = contents(pair[0], optimizer), optimizer.state_dict()["param_groups"]
    if not dist.is_initialized() or not dist.get_rank():
        torch.save((*found, groups), path)
    _steps(pair, optimizer, range(3, 8), "weight")
    return contents(pair[0], optimizer)


@torch.no_grad()
def _load(pair: tuple[nn.Module, nn.Module], optimizer: PreconditionedGD, path: str) -> None:
    found, state, groups = torch.load(path)
    for p, value in zip(pair[0].parameters(), found, strict=True):
        copy_(p, value)
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def resumed_frozen(recipe: str, wrap: str, path: str) -> Contents:
    """The same from what any number of ranks saved."""
    pair = _net(wrap)
    optimizer = OTHERS[recipe](pair[1])
    _load(pair, optimizer, path)
    _steps(pair, optimizer, range(3, 8), "weight")
    return contents(pair[0], optimizer)


def handed_on(recipe: str, wrap: str) -> Contents:
    """All blocks change their owners after some steps, and back after some more."""
    pair = _net(wrap)
    optimizer = OTHERS[recipe](pair[1])
    for first in (0, 3, 6):
        _steps(pair, optimizer, range(first, first + 3), "bias")
        optimizer._owners = {p: 1 - owner for p, owner in optimizer._owners.items()}
        optimizer._bind()
    return contents(pair[0], optimizer)
