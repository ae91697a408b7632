"""Wrappers that need a training of their own: run on each rank by :class:`distributed.pool.Pool`, or by one process alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.distributed.tensor.parallel.ddp import _pre_dp_module_transform
from torch.nn.parallel import DistributedDataParallel

import precond
from distributed.training import EPS, full
from precond import BNP, RMS, SAM, PreconditionedGD, auto, muon, shampoo, soap, whitening

RECIPES: dict[str, Callable[[nn.Module], PreconditionedGD]] = {
    "BNP @ RMS": lambda m: PreconditionedGD(m, 0.02, preconditioner=BNP() @ RMS(eps=EPS)),
    "SAM": lambda m: PreconditionedGD(m, 0.02, preconditioner=BNP() @ RMS(eps=EPS), regularizers=[SAM(0.1)]),
    "muon": lambda m: muon(m, lr=0.01, arithmetic="full"),
    "shampoo": lambda m: shampoo(m, lr=0.01, precondition_frequency=2),
    "soap": lambda m: soap(m, lr=0.01, eps=EPS, precondition_frequency=2),
    "whitening": lambda m: whitening(m, lr=0.01, eps=EPS),
    "auto": lambda m: auto(m, lr=0.01),
}


def _rank() -> int | None:
    return dist.get_rank() if dist.is_initialized() else None


def _mesh(*names: str, shape: tuple[int, ...] | None = None) -> Any:
    return init_device_mesh("cpu", shape or (dist.get_world_size(),), mesh_dim_names=names or None)


def _samples(k: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) * 3 + 1


def _params(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): full(p) for name, p in model.named_parameters()}


# --- forwards and backwards in bfloat16 ---------------------------------------------------------------------------------------


def mixed(recipe: str) -> dict[str, Tensor]:
    """FSDP2 with a policy of 16 bits; alone, what that says, written out: cast parameters, gradients of each share added in float32."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))
    rank, ranks = _rank(), 2
    if rank is not None:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for module in (model[0], model[2], model):
            fully_shard(module, mesh=_mesh(), mp_policy=policy)
    optimizer = RECIPES[recipe](model)
    for k in range(4):
        x = _samples(k, (8, 6)).float().chunk(ranks)
        optimizer.zero_grad()
        if rank is not None:
            model(x[rank]).float().square().mean().backward()
        else:
            for part in x:
                narrow = {name: p.bfloat16() for name, p in model.named_parameters()}
                (torch.func.functional_call(model, narrow, (part.bfloat16(),)).float().square().mean() / ranks).backward()
        optimizer.step()
    return _params(model)


# --- parameters that some ranks do not use --------------------------------------------------------------------------------------


class Branches(nn.Module):
    """Two layers, the second of which is for some samples only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 1)

    def forward(self, x: Tensor, both: bool) -> Tensor:
        h = self.first(x).tanh()
        return self.last(self.second(h).tanh() if both else h)


USED: dict[str, Callable[[int, int], bool]] = {
    "not on rank 1": lambda k, rank: rank == 0,
    "on one rank, in turn": lambda k, rank: (k + rank) % 2 == 0,
    "by none in some steps": lambda k, rank: k != 1,
    "by none at first": lambda k, rank: k > 1,
}


def unused(recipe: str, used: str) -> dict[str, Tensor]:
    """DDP that looks for what a loss does not use."""
    torch.manual_seed(0)
    model: nn.Module = Branches().double()
    rank, ranks = _rank(), 2
    if rank is not None:
        model = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = RECIPES[recipe](model)
    for k in range(5):
        x = _samples(k, (8, 5)).chunk(ranks)

        def loss(k: int = k, x: tuple[Tensor, ...] = x) -> Tensor:
            of = range(ranks) if rank is None else [rank]
            parts = [model(x[r], USED[used](k, r)).square().mean() for r in of]
            return sum(parts[1:], parts[0]) / len(parts)

        optimizer.step(precond.LossClosure(loss))
    return _params(model)


# --- tensor parallelism ----------------------------------------------------------------------------------------------------------


class Norms(nn.Module):
    """A normalization on sequences, between layers of which one is divided by outputs and one by inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).tanh())


def sequences(recipe: str) -> dict[str, Tensor]:
    """Sequence parallelism: times are divided between the layers that features are divided in."""
    torch.manual_seed(0)
    model = Norms().double()
    if _rank() is not None:
        plan = {
            "": PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1)),
            "norm": SequenceParallel(),
            "up": ColwiseParallel(input_layouts=Shard(1)),
            "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
        }
        parallelize_module(model, _mesh("tensor"), plan)
    optimizer = RECIPES[recipe](model)
    for k in range(4):
        x = _samples(k, (3, 4, 6))

        def loss(x: Tensor = x) -> Tensor:
            out = model(x)
            return (out.full_tensor() if isinstance(out, DTensor) else out).square().mean()

        optimizer.step(precond.LossClosure(loss))
    return _params(model)


def _replicated(model: nn.Module, mesh: Any) -> nn.Module:
    for module in (model[0], model[2], model):
        replicate(module, mesh=mesh)
    return model


def copies_of_parts(recipe: str) -> dict[str, Tensor]:
    """Tensor parallelism, of which there are two copies."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4)).double()
    shares, part = 1, 0
    if _rank() is not None:
        mesh = _mesh("data", "tensor", shape=(2, dist.get_world_size() // 2))
        parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        model = _replicated(model, mesh["data"])
        shares, part = 2, mesh.get_local_rank("data")
    optimizer = RECIPES[recipe](model)
    for k in range(4):
        x = _samples(k, (8, 6)).chunk(shares)[part]
        optimizer.step(precond.LossClosure(lambda x=x: model(x).square().mean()))
    return _params(model)


# --- experts -----------------------------------------------------------------------------------------------------------------------


class Routed(nn.Module):
    """Matrices of which each sees some rows: row i goes to expert i mod E."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(n, 6, 4) / 3)

    def forward(self, h: Tensor) -> Tensor:
        W = self.W
        if isinstance(W, DTensor):  # an engine would send rows to their experts; the gradient is the same
            W = W.full_tensor(grad_placements=[Partial()])
        return torch.einsum("bei,eio->beo", h.unflatten(0, (-1, len(W))), W).flatten(0, 1)


def _of_experts(layer: Routed, h: Tensor) -> tuple[Tensor, ...]:
    return tuple(h.unflatten(0, (-1, len(layer.W))).unbind(1))


precond.register_layer(Routed, precond.Observed("W", None, "eio", _of_experts))


def experts(recipe: str, n: int = 3) -> dict[str, Tensor]:
    """Experts divided along their first dimension over a mesh of their own, unevenly, and the rest by FSDP2 over the same ranks."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), Routed(n)).double()
    rank = _rank()
    shares, part = 1, 0
    if rank is not None:
        shares, part = dist.get_world_size(), rank
        model[2].W = nn.Parameter(distribute_tensor(model[2].W.detach(), _mesh("experts"), [Shard(0)]))
        fully_shard(model, mesh=_mesh("data"), ignored_params={model[2].W})
    optimizer = RECIPES[recipe](model)
    for k in range(4):
        x = _samples(k, (12, 5)).chunk(shares)[part]

        def closure(x: Tensor = x) -> Tensor:
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            if rank is not None:
                model[2].W.grad /= shares  # which all ranks' losses add to; FSDP2 averages the rest
            return loss

        optimizer.step(closure)
    return _params(model)


# --- what is refused -----------------------------------------------------------------------------------------------------------------


def localized() -> None:
    """Parts of parameters that stand in their place between forwards."""
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4))
    parallelize_module(model, _mesh("tensor"), {"0": ColwiseParallel(), "2": RowwiseParallel()})
    _pre_dp_module_transform(model)
    muon(model)


def without_backend() -> None:
    """Parameters on a device whose tensors the ranks cannot send each other, as after offloading where there is NCCL alone."""
    group = dist.new_group(backend="cuda:gloo")
    muon(fully_shard(nn.Linear(3, 2), mesh=DeviceMesh.from_group(group, "cpu")))
