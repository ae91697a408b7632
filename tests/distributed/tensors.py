"""Tensor parallelism: run on each rank by :class:`distributed.pool.Pool`, or by one process alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from distributed.training import EPS, full
from precond import BNP, RMS, SAM, LossClosure, PreconditionedGD, adamw, auto, muon, shampoo, soap, whitening

RECIPES: dict[str, Callable[[nn.Module], PreconditionedGD]] = {
    "adamw, clipped": lambda m: adamw(m, lr=0.01, eps=EPS, max_norm=0.05),
    "BNP @ RMS": lambda m: PreconditionedGD(m, 0.02, preconditioner=BNP() @ RMS(eps=EPS)),
    "SAM": lambda m: PreconditionedGD(m, 0.02, preconditioner=BNP() @ RMS(eps=EPS), regularizers=[SAM(0.1)]),
    "muon": lambda m: muon(m, lr=0.01, arithmetic="full"),
    "shampoo": lambda m: shampoo(m, lr=0.01, precondition_frequency=2),
    "soap": lambda m: soap(m, lr=0.01, eps=EPS, precondition_frequency=2),
    "whitening": lambda m: whitening(m, lr=0.01, eps=EPS),
    "auto": lambda m: auto(m, lr=0.01),
}


def train(recipe: str, copies: int = 1, steps: int = 4) -> dict[str, Tensor]:
    """A layer divided by its outputs, one by its inputs, over all ranks, or over those of each of some shares of the data (FSDP2)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4)).double()
    part = 0
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (copies, dist.get_world_size() // copies), mesh_dim_names=("data", "tensor"))
        parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        if copies > 1:
            fully_shard(model, mesh=mesh["data"])
            part = mesh.get_local_rank("data")
    shares = copies if dist.is_initialized() else 1
    optimizer = RECIPES[recipe](model)
    for k in range(steps):
        x = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) * 3 + 1
        x = x.chunk(shares)[part]
        optimizer.step(LossClosure(lambda x=x: model(x).square().mean()))
    return {name: full(p) for name, p in model.named_parameters()}
