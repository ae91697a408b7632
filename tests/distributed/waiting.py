"""State saved and loaded around steps in which layers are frozen: run on each rank by :class:`distributed.pool.Pool`, or alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import precond
from distributed.training import EPS, contents
from precond import BNP, PreconditionedGD

WIDTH, STEPS = 66, 7  # matrices of more than 4096 numbers leave in rows
FROZEN = {"2": (2, 3), "3": (2, 3), "4": (3, 4)}
"""Of each layer the steps in which it is frozen."""
WHEN: dict[str, tuple[int, ...]] = {
    "right after freezing": (2,),
    "twice while frozen": (3, 4),
    "while others freeze, made before": (3,),
    "right after thawing": (5,),
}
"""Before which steps a new optimizer takes over, made for the model as it is then, or before anything is frozen."""

RECIPES: dict[str, Callable[[nn.Module], PreconditionedGD]] = {
    "adamw": lambda m: precond.adamw(m, lr=0.01, eps=EPS),
    "bnp": lambda m: precond.bnp(m, lr=0.02),
    "adam, BNP": lambda m: precond.adam(m, lr=0.01, eps=EPS, inputs=BNP()),
    "muon": lambda m: precond.muon(m, lr=0.01, arithmetic="full"),
    "soap": lambda m: precond.soap(m, lr=0.01, eps=EPS, precondition_frequency=2),
    "whitening": lambda m: precond.whitening(m, lr=0.01, eps=EPS),
    "auto": lambda m: precond.auto(m, lr=0.01),
}
WRAPS = {"ddp": 2, "fsdp": 2, "tensor": 2, "hsdp": 4, "fsdp and tensor": 4}
"""And at how many ranks."""
DIVIDED = {
    "0": ColwiseParallel(),
    "2": RowwiseParallel(output_layouts=Shard(1)),
    "3": SequenceParallel(),
    "4": ColwiseParallel(input_layouts=Shard(1)),
    "6": RowwiseParallel(),
}


class Run:
    """A training: its ranks, and who steps it."""

    def __init__(self, recipe: str, wrap: str):
        torch.manual_seed(0)
        self.plain = self.model = nn.Sequential(
            nn.Linear(6, 8),
            nn.Tanh(),
            nn.Linear(8, WIDTH),
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, WIDTH),
            nn.Tanh(),
            nn.Linear(WIDTH, 4),
        ).double()
        self.shares, self.share = 1, 0
        if dist.is_initialized():
            self._wrap(wrap)
        self.optimizer = RECIPES[recipe](self.model)

    def _wrap(self, wrap: str) -> None:
        world = dist.get_world_size()
        if wrap == "ddp":
            self.model: nn.Module = DistributedDataParallel(self.plain, find_unused_parameters=True)
            self.shares, self.share = world, dist.get_rank()
            return
        if "tensor" in wrap:
            copies = 1 if wrap == "tensor" else 2
            mesh = init_device_mesh("cpu", (copies, world // copies), mesh_dim_names=("data", "tensor"))
            parallelize_module(self.plain, mesh["tensor"], DIVIDED)
            self.shares, self.share = copies, mesh.get_local_rank("data")
            mesh = mesh["data"]
        elif wrap == "hsdp":
            mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("copies", "parts"))
            self.shares, self.share = world, dist.get_rank()
        else:
            mesh = init_device_mesh("cpu", (world,))
            self.shares, self.share = world, dist.get_rank()
        if wrap != "tensor":
            for layer in self.plain:
                if not isinstance(layer, nn.Tanh):
                    fully_shard(layer, mesh=mesh)
            fully_shard(self.plain, mesh=mesh)

    def freeze(self, k: int) -> None:
        for name, steps in FROZEN.items():
            self.plain.get_submodule(name).requires_grad_(k not in steps)

    def step(self, k: int) -> None:
        x = torch.randn(8, 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) * 3 + 1
        self.optimizer.zero_grad()
        self.model(x.chunk(self.shares)[self.share]).square().mean().backward()
        self.optimizer.step()

    def contents(self) -> dict[str, Any]:
        return contents(self.plain, self.optimizer)


def never_stopped(recipe: str, wrap: str = "") -> dict[str, Any]:
    run = Run(recipe, wrap)
    for k in range(STEPS):
        run.freeze(k)
        run.step(k)
    return run.contents()


def resumed(recipe: str, wrap: str = "") -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What comes of a run that never stopped, and of those that did."""
    found = {}
    for name, when in WHEN.items():
        run = Run(recipe, wrap)
        for k in range(STEPS):
            run.freeze(k)
            if k in when:
                state = run.optimizer.state_dict()
                run.plain.requires_grad_(True) if "made before" in name else None
                run.optimizer = RECIPES[recipe](run.model)
                run.freeze(k)
                run.optimizer.load_state_dict(state)
            run.step(k)
        found[name] = run.contents()
    return never_stopped(recipe, wrap), found


def saved(recipe: str, wrap: str, path: str) -> dict[str, Any]:
    """Saved while two layers are frozen by torch.distributed.checkpoint in either of its ways, and gone on; what comes of it."""
    run = Run(recipe, wrap)
    for k in range(STEPS):
        run.freeze(k)
        if k == 3:
            model_state, optimizer_state = get_state_dict(run.model, run.optimizer)
            dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=f"{path}/by name")
            dcp.save({"model": model_state, "optimizer": run.optimizer.state_dict()}, checkpoint_id=f"{path}/plain")
        run.step(k)
    return run.contents()


def loaded(recipe: str, wrap: str, path: str) -> dict[str, dict[str, Any]]:
    """What comes of it where that is loaded, whoever saved it: with layers frozen, or before they are where torch leaves out what is frozen."""
    return dict(_loaded(recipe, wrap, path))


def _loaded(recipe: str, wrap: str, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for way in ("plain", "by name"):
        run = Run(recipe, wrap)
        if way == "plain":
            run.freeze(3)
        model_state, optimizer_state = get_state_dict(run.model, run.optimizer)
        state = {"model": model_state, "optimizer": run.optimizer.state_dict() if way == "plain" else optimizer_state}
        dcp.load(state, checkpoint_id=f"{path}/{way}")
        if way == "plain":
            run.plain.load_state_dict(state["model"])
            run.optimizer.load_state_dict(state["optimizer"])
        else:
            set_state_dict(run.model, run.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        for k in range(3, STEPS):
            run.freeze(k)
            run.step(k)
        yield way, run.contents()
