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

from precond import PreconditionedGD, auto, whitening
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
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
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
