"""One training, by one process on all samples or by several on their shares: what the tests compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from precond import (
    BNP,
    EMA,
    KFAC,
    L1,
    L2,
    RMS,
    SAM,
    AdaGrad,
    Auto,
    EMANesterov,
    GradientNorm,
    LossClosure,
    Momentum,
    PreconditionedGD,
    RelativeRMS,
    Whitening,
    adagrad,
    adamw,
    auto,
    muon,
    rmsprop,
    sgd,
    shampoo,
    soap,
    whitening,
)

STEPS = 4
EPS = 1e-3  # the gradient of the keys' bias is rounding noise, which must not be normalized


class Net(nn.Module):
    """Layers of every kind, some with fewer rows than are divided evenly."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 3, groups=2, padding=1)
        self.norm = nn.LayerNorm(6)
        self.attention = nn.MultiheadAttention(6, 2)
        self.head = nn.Linear(6, 3)
        self.last = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.conv(x).movedim(2, 0))
        return self.last(self.head(self.attention(h, h, h)[0]).tanh()).mean(0)


OPTIMIZERS: dict[str, Callable[[nn.Module], PreconditionedGD]] = {
    "sgd": lambda m: sgd(m, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda m: adamw(m, lr=0.01, eps=EPS),
    "rmsprop": lambda m: rmsprop(m, lr=0.01, eps=EPS, momentum=0.5, weight_decay=0.1),
    "adagrad": lambda m: adagrad(m, lr=0.05, eps=EPS),
    "adamw, loop": lambda m: adamw(m, lr=0.01, eps=EPS, engine="loop"),
    "adamw, clipped": lambda m: adamw(m, lr=0.01, eps=EPS, max_norm=0.05),
    "BNP": lambda m: PreconditionedGD(m, 0.05, preconditioner=BNP(), momentum=Momentum(0.9, "heavy_ball")),
    "BNP, loop": lambda m: PreconditionedGD(m, 0.05, preconditioner=BNP(damping=0.0), engine="loop"),
    "BNP, patch, width": lambda m: _bnp(m, BNP(conv="patch", width_scaling=True)),
    "BNP, clipped": lambda m: PreconditionedGD(m, 0.05, preconditioner=BNP(damping=0.0), max_norm=0.1),
    "BNP @ RMS": lambda m: _bnp(m, BNP() @ RMS(eps=EPS), momentum=Momentum(0.9)),
    "BNP @ RelativeRMS": lambda m: _bnp(m, BNP() @ RelativeRMS(eps=EPS, large=0.0), momentum=Momentum(0.9)),
    "Whitening @ RelativeRMS": lambda m: _bnp(m, Whitening(damping=0.05) @ RelativeRMS(eps=EPS, large=0.0)),
    "BNP @ AdaGrad": lambda m: _bnp(m, BNP() @ AdaGrad(eps=EPS)),
    "Whitening": lambda m: _bnp(m, Whitening(damping=0.05)),
    "Whitening, SAM": lambda m: _bnp(m, Whitening(damping=0.05, root="cholesky") @ RMS(eps=EPS), SAM(0.1, damping=0.2)),
    "L1": lambda m: _bnp(m, BNP() @ RMS(eps=EPS), L1(0.1)),
    "L1, proximal": lambda m: _bnp(m, BNP(damping=0.0) @ RMS(eps=EPS), L1(0.1, proximal=True)),
    "L1 in p": lambda m: adamw(m, lr=0.01, eps=EPS, regularizers=[L1(0.1, space="p", proximal=True)]),
    "L2": lambda m: _bnp(m, BNP(damping=0.0) @ RMS(eps=EPS), L2(0.1), L2(0.01, space="p")),
    "SAM": lambda m: _bnp(m, BNP(damping=0.0) @ RMS(eps=EPS), SAM(0.1)),
    "SAM, BNP": lambda m: _bnp(m, BNP(damping=0.0), SAM(0.1, damping=0.2)),
    "SAM in p": lambda m: adamw(m, lr=0.01, eps=EPS, regularizers=[SAM(0.1, space="p")]),
    "SAM, RMS": lambda m: adamw(m, lr=0.01, eps=EPS, regularizers=[SAM(0.1)]),
    "SAM, adaptive": lambda m: _bnp(m, BNP(damping=0.0) @ RMS(eps=EPS), SAM(0.1, adaptive=True)),
    "SAM, lagged": lambda m: _bnp(m, BNP(damping=0.0) @ RMS(eps=EPS), SAM(0.1), statistics_from="lagged"),
    "SAM, damped whitening of rank 1": lambda m: _bnp(m, Whitening(damping=0.05, rank=1), SAM(0.1, damping=0.2)),
    "SAM, some": lambda m: _bnp(m, RMS(eps=EPS), SAM(0.1, where="*.weight")),
    "gradient norm": lambda m: _bnp(m, BNP(damping=0.0) @ RMS(eps=EPS), GradientNorm(0.002)),
    "gradient norm, central": lambda m: _bnp(m, BNP(damping=0.0), GradientNorm(0.002, method="central", power=1, space="p")),
    "gradient norm, q=1": lambda m: _bnp(m, BNP(damping=0.0), GradientNorm(0.001, q=1)),
    "gradient norm, q=∞": lambda m: _bnp(m, RMS(eps=EPS), GradientNorm(0.001, q=float("inf"), damping=0.0)),
    "gradient norm, exact": lambda m: _bnp(m, BNP(damping=0.0) @ RMS(eps=EPS), GradientNorm(0.002, method="exact")),
}
WHOLE: dict[str, Callable[[nn.Module], PreconditionedGD]] = {
    "auto": lambda m: auto(m, lr=0.01),
    "auto, white": lambda m: auto(m, lr=0.01, choice=Auto(white=1e-3)),  # all inputs are, after what it measures
    "auto, loop": lambda m: auto(m, lr=0.01, engine="loop"),
    "auto, SAM": lambda m: auto(m, lr=0.01, regularizers=[SAM(0.1, space="p")]),
    "muon": lambda m: muon(m, lr=0.01, arithmetic="full"),
    "shampoo": lambda m: shampoo(m, lr=0.01, precondition_frequency=2),
    "soap": lambda m: soap(m, lr=0.01, eps=EPS, precondition_frequency=2),
    "kfac": lambda m: _bnp(m, KFAC(damping=0.05, every=2, output_every=2)),
    "whitening": lambda m: whitening(m, lr=0.01, eps=EPS),
    "soap, SAM": lambda m: soap(m, lr=0.01, eps=EPS, precondition_frequency=2, regularizers=[SAM(0.1)]),
    "soap, average": lambda m: soap(m, lr=0.01, eps=EPS, precondition_frequency=2, average=EMA(0.5)),
    "auto, ahead of its average": lambda m: auto(m, lr=0.01, average=EMANesterov(0.5)),
}
# Matrices as a whole.
OPTIMIZERS |= WHOLE


def _bnp(model: nn.Module, preconditioner, *regularizers, **options) -> PreconditionedGD:
    return PreconditionedGD(model, 0.02, preconditioner=preconditioner, regularizers=regularizers, **options)


@dataclass(frozen=True)
class Setting:
    """A training.

    Attributes:
        shares: how many of a batch's samples each rank gets; the last batch's are turned around.
        wrap: ``"ddp"`` or a function of this module that shards a model.
        how: ``"closure"`` or ``"probe"`` (loss.backward() and ``while opt.probe()``).
        dtype: of parameters and data.
        parts: micro-batches per step.
    """

    optimizer: str
    shares: tuple[int, ...] = (6, 6)
    wrap: str = "ddp"
    how: str = "closure"
    dtype: torch.dtype = torch.float64
    parts: int = 1
    steps: int = STEPS


def batch(k: int, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(100 + k)
    x = torch.randn(n, 4, 5, generator=make, dtype=torch.float64)
    x = x * torch.tensor([0.2, 1, 5, 1]).reshape(4, 1) + 1
    return x.to(dtype), torch.randn(n, 1, generator=make, dtype=torch.float64).to(dtype)


def build(setting: Setting, rank: int | None) -> tuple[nn.Module, PreconditionedGD]:
    torch.manual_seed(0)
    model: nn.Module = Net().to(setting.dtype)
    if rank is not None:
        model = WRAPS[setting.wrap](model)
    return model, OPTIMIZERS[setting.optimizer](model)


def fit(setting: Setting, model: nn.Module, optimizer: PreconditionedGD, rank: int | None, first: int = 0) -> list[float]:
    """Train; the losses of all ranks together."""
    losses = []
    for k in range(first, first + setting.steps):
        x, y = batch(k, sum(setting.shares), setting.dtype)
        shares = setting.shares[:: -1 if k == first + setting.steps - 1 else 1]
        weight = 1.0
        if rank is not None:
            x, y = x.split(list(shares))[rank], y.split(list(shares))[rank]
            weight = dist.get_world_size()  # DDP and FSDP average over ranks

        def loss(x=x, y=y, weight=weight) -> Tensor:
            return weight * (model(x) - y).square().sum() / sum(setting.shares)

        def backward(x=x, y=y, loss=loss) -> None:
            pieces = list(zip(x.chunk(setting.parts), y.chunk(setting.parts), strict=True))
            for i, (a, b) in enumerate(pieces):
                with _local(model) if rank is not None and i < len(pieces) - 1 else nullcontext():
                    loss(a, b).backward()

        value = loss().detach()
        optimizer.zero_grad()
        if setting.how == "closure":
            optimizer.step(LossClosure(loss))
        else:
            optimizer.last.loss = None
            _forget(optimizer)
            backward()
            while optimizer.probe():
                backward()
            optimizer.step()
        if rank is not None:
            dist.all_reduce(value)
            value /= dist.get_world_size()
        losses.append(value.item())
    return losses


@contextmanager
def _local(model: nn.Module) -> Iterator[None]:
    """A backward whose gradients wait for the next one's, with which they are reduced."""
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
        return
    model.set_requires_gradient_sync(False)
    yield
    model.set_requires_gradient_sync(True)


def _forget(optimizer: PreconditionedGD) -> None:
    """The loss that was looked at is no forward of the step."""
    optimizer._model_hooks.again(optimizer._bound.cells)


def train(setting: Setting) -> dict[str, Any]:
    """Parameters, state and losses; all samples in one process where no group is initialized."""
    rank = dist.get_rank() if dist.is_initialized() else None
    model, optimizer = build(setting, rank)
    losses = fit(setting, model, optimizer, rank)
    return {"losses": losses, **contents(model, optimizer)}


def contents(model: nn.Module, optimizer: PreconditionedGD) -> dict[str, Any]:
    names = {p: name.removeprefix("module.") for name, p in model.named_parameters()}
    state = optimizer.state_dict()["state"]
    index = {p: i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    return {
        "params": {name: full(p) for p, name in names.items()},
        "state": {f"{name} {key}": full(t) for p, name in names.items() for key, t in state.get(index[p], {}).items()},
    }


def full(t: Tensor) -> Tensor:
    """The whole tensor, wherever its parts are."""
    t = t.detach()
    return (t.full_tensor() if isinstance(t, DTensor) else t).clone()


def fsdp(model: nn.Module, **options: Any) -> nn.Module:
    """Rows divided: 18 of the attention within a group, 3 of the head unevenly, 1 of the last layer to one rank alone."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (model.conv, model.attention, model.head):
        fully_shard(module, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def fsdp_inside(model: nn.Module) -> nn.Module:
    """Groups of their own for a layer of one row, of which a rank holds nothing, and for a normalization layer."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (model.last, model.norm):
        fully_shard(module, mesh=mesh)
    return model


def fsdp_partly(model: nn.Module) -> nn.Module:
    """Some layers whole on each rank."""
    ignored = {*model.head.parameters(), *model.norm.parameters()}
    model = fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), ignored_params=ignored)
    for p in ignored:
        p.register_post_accumulate_grad_hook(_average)
    return model


def hsdp(*shape: int) -> Callable[[nn.Module], nn.Module]:
    """Whole copies along the first dimension of the mesh, parts along the second."""

    def wrap(model: nn.Module) -> nn.Module:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copies", "parts"))
        fully_shard(model.attention, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    return wrap


def _average(p: Tensor) -> None:
    dist.all_reduce(p.grad)
    p.grad /= dist.get_world_size()


WRAPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ddp": DistributedDataParallel,
    "ddp, views": partial(DistributedDataParallel, gradient_as_bucket_view=True),
    "ddp, static": partial(DistributedDataParallel, static_graph=True),
    "ddp, static views": partial(DistributedDataParallel, static_graph=True, gradient_as_bucket_view=True),
    "ddp, searching": partial(DistributedDataParallel, find_unused_parameters=True),
    "replicate": lambda model: replicate(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),))),
    "fsdp": fsdp,
    "fsdp, nested": lambda model: fsdp(fsdp_inside(model)),
    "fsdp, kept": partial(fsdp, reshard_after_forward=False),
    "fsdp, offloaded": partial(fsdp, offload_policy=CPUOffloadPolicy(pin_memory=False)),
    "fsdp, partly": fsdp_partly,
    "hsdp, two parts": hsdp(1, 2),
    "hsdp, two copies": hsdp(2, 1),
    "hsdp, copies of parts": hsdp(2, 2),
}
