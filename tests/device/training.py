"""Trainings on the pretended device beside the same on the CPU: what each ends at, and what it did on the way."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

import precond
from contract.table import EVERY, OWN, batches, net
from contract.table import closure as on_the_cpu
from device.driving import metered_hooks
from device.graphs import Graph
from device.meter import METER, Count
from device.pretended import move, on_cpu, to_device
from device.twins import Loss, Twins

WARM_UP = 8  # steps in which a method may look at what was seen first
RATE = 0.003

WARM, STEPS = 8, 14
Make = Callable[..., torch.optim.Optimizer]
Batch = tuple[Tensor, Tensor]


@dataclass
class Followed:
    """How a training on the device went.

    Attributes:
        distance: of its parameters from those on the CPU, relative.
        strayed: entries of state that are not where their parameter is, but for what the host keeps.
        count: what all steps did, hooks included.
        warm: what the steps after the first :data:`WARM` did.
    """

    distance: float
    strayed: list[str]
    count: Count
    warm: Count


@dataclass
class Training:
    """Twins and the optimizer of the one on the device."""

    twins: Twins
    optimizer: torch.optim.Optimizer
    loss: Loss = field(default=lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]))

    def step(self, batch: Batch, count: Count) -> None:
        def run() -> Tensor:
            with METER.into(None), metered_hooks(self.twins.model, count):
                self.optimizer.zero_grad()
                return self.twins.backward(self.loss, batch)

        with METER.into(count):
            self.optimizer.step(run)

    def steps(self, data: Sequence[Batch], start: int = 0) -> Count:
        """Random numbers are a function of the step alone, as in ``contract.table.train``."""
        count = Count()
        for t, batch in enumerate(data, start):
            torch.manual_seed(100 + t)
            self.step(batch, count)
        return count

    @property
    def end(self) -> Tensor:
        return flat(self.twins.model)

    @property
    def strayed(self) -> list[str]:
        names = {p: n for n, p in self.twins.model.named_parameters()}
        return [
            f"{names[p]}: {key} on {t.device}"
            for p, entries in self.optimizer.state.items()
            for key, t in entries.items()
            if isinstance(t, Tensor) and key.rpartition(".")[2] not in ON_THE_HOST and t.device != p.device
        ]


ON_THE_HOST = {"step", "count", "noise", "size", "examples", "form", "averaged", "scale"}
"""Numbers that the host knows and keeps: of steps, as torch does, of the samples that layers saw, and what first outputs were large by."""


def flat(model: nn.Module) -> Tensor:
    return torch.cat([on_cpu(p).flatten() for p in model.parameters()])


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def _cpu(model: nn.Module, optimizer: torch.optim.Optimizer, data: Sequence[Batch], loss: Loss | None = None) -> Tensor:
    for t, batch in enumerate(data):
        torch.manual_seed(100 + t)

        def own(batch: Batch = batch) -> Tensor:
            optimizer.zero_grad()
            value = loss(model, batch)
            value.backward()
            return value

        optimizer.step(on_the_cpu(model, optimizer, batch) if loss is None else own)
    return flat(model)


def followed(name: str) -> Followed:
    """A configuration of the contract's table, on its net."""
    return _trained(name)[0]


@cache
def _trained(name: str) -> tuple[Followed, Any, Any, Tensor]:
    """How it went; the model and the optimizer after :data:`WARM` steps, on the host; the parameters at the end."""
    data = batches(STEPS)
    twins = Twins(net())
    training = Training(twins, EVERY[name](twins.model))
    count = training.steps(data[:WARM])
    saved = _on_host(twins.model.state_dict()), copy.deepcopy(_on_host(training.optimizer.state_dict()))
    warm = training.steps(data[WARM:], WARM)
    model = net()
    end = _cpu(model, EVERY[name](model), data)
    return Followed(relative(training.end, end), training.strayed, count.plus(warm), warm), *saved, training.end


class Spread(nn.Module):
    """Linear layers, each of which may be on a device of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(n, 6, dtype=torch.float64) for n in (5, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x.to(layer.weight.device)))
        return x


@cache
def spread(name: str) -> Followed:
    """Parameters on ``cuda:0``, ``cuda:1`` and the CPU in one optimizer."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return (model(batch[0]) - 1).square().mean()

    torch.manual_seed(0)
    twins, model = Twins(Spread()), Spread()
    model.load_state_dict(twins.twin.state_dict())
    for layer, device in zip(twins.model.layers, ("cuda:0", "cuda:1", "cpu"), strict=True):
        move(layer, device)
    data = [(torch.randn(8, 5, dtype=torch.float64), torch.zeros(())) for _ in range(6)]
    training = Training(twins, OWN[name](twins.model), loss)
    count = training.steps(data)
    end = _cpu(model, OWN[name](model), data, loss)
    return Followed(relative(training.end, end), training.strayed, count, count)


def resumed(name: str) -> tuple[bool, list[str]]:
    """Whether a training that was saved to the host and loaded goes on as if never stopped, and what strayed."""
    _, model, optimizer, end = _trained(name)
    twins = Twins(net())
    twins.model.load_state_dict(model)
    successor = Training(twins, EVERY[name](twins.model, lr=99.0))
    successor.optimizer.load_state_dict(optimizer)
    successor.steps(batches(STEPS)[WARM:], WARM)
    return torch.equal(end, successor.end), successor.strayed


def _on_host(x: Any) -> Any:
    if isinstance(x, Tensor):
        return on_cpu(x).clone()
    if isinstance(x, dict):
        return {k: _on_host(v) for k, v in x.items()}
    return type(x)(map(_on_host, x)) if isinstance(x, list | tuple) else x


def _scripted(make: Make, steps: int, before_step: Callable[[Any, int], None], scale: float = 1.0) -> tuple[Tensor, Count, Any]:
    """Steps with gradients of a seed and no closure; what they cost after those that warm up."""
    torch.manual_seed(0)
    model = move(net())
    optimizer, count = make(model), Count()
    for t in range(steps):
        for p in model.parameters():
            p.grad = to_device(scale * torch.randn(p.shape, dtype=p.dtype))
        before_step(optimizer, t)
        with METER.into(count if t >= WARM_UP else Count()):
            optimizer.step()
    return flat(model), count, optimizer


@cache
def _unscaled(name: str) -> Tensor:
    """Where steps of a rate that is a number end."""
    return _scripted(lambda m: EVERY[name](m, lr=RATE), WARM_UP + 2, lambda o, t: None)[0]


@cache
def scaled(name: str) -> tuple[float, bool, int]:
    """As ``GradScaler.step`` hands its tensors over: distance from the unscaled, whether an overflow then changed nothing, waits."""
    before: list[Tensor] = []

    def scaler(optimizer: Any, t: int) -> None:
        overflow = t == WARM_UP + 2
        optimizer.grad_scale, optimizer.found_inf = to_device(torch.tensor(1024.0)), to_device(torch.tensor(float(overflow)))
        if overflow:
            before.append(torch.cat([on_cpu(p).flatten() for group in optimizer.param_groups for p in group["params"]]))

    ours, count, _ = _scripted(lambda m: EVERY[name](m, lr=RATE), WARM_UP + 3, scaler, 1024.0)
    return relative(ours, _unscaled(name)), torch.equal(ours, before[0]), count.reads.total()


def tensor_lr(name: str, device: str) -> tuple[float, int]:
    """A rate that is a tensor, of the device or of the host: distance from the number's, and waits."""
    rate = to_device(torch.tensor(RATE, dtype=torch.float64), device)
    ours, count, _ = _scripted(lambda m: EVERY[name](m, lr=rate), WARM_UP + 2, lambda o, t: None)
    return relative(ours, _unscaled(name)), count.reads.total()


@dataclass
class Captured:
    """How a training went whose later steps were repeated by pretended CUDA graphs, one for each program of its steps.

    Attributes:
        distance: of its parameters from those of the same steps done by Python, relative.
        counts: of steps, in its state at the end.
        programs: how many graphs there were.
        count: what happened while these were captured.
    """

    distance: float
    counts: set[float]
    programs: int
    count: Count


Finds = Literal["scaler", "optimizer"]
"""Who finds that a gradient is not finite."""


def captured(name: str, steps: int = 24, warm: int = 3, overflow: Sequence[int] = (), finds: Finds = "scaler") -> Captured:
    """A rate that is a tensor, and falls; gradients at one place, as graphs find them, of which some are not finite.

    Those steps are skipped. The training that Python does leaves them out.
    """
    scaled = bool(overflow) and finds == "scaler"
    torch.manual_seed(0)
    model, rate = _still()
    plain = EVERY[name](model, lr=rate)
    for t in range(steps):
        _renew(model, rate)
        if t not in overflow:
            plain.step()
    end = flat(model)
    torch.manual_seed(0)
    model, rate = _still()
    scale, found = to_device(torch.tensor(8.0)), to_device(torch.tensor(0.0))
    optimizer = EVERY[name](model, lr=rate, capturable=True, **({"nonfinite": "skip"} if overflow and not scaled else {}))
    graphs: dict[Any, Graph] = {}
    count = Count()
    for t in range(steps):
        _renew(model, rate, math.inf if t in overflow else 8.0 if scaled else 1.0)
        on_cpu(found).fill_(float(t in overflow))
        if scaled:
            optimizer.grad_scale, optimizer.found_inf = scale, found
        if t < warm:
            optimizer.step()
            continue
        key = optimizer.program
        if key not in graphs:
            graphs[key] = _capture(model, optimizer, count)
        graphs[key].replay()
        optimizer.replayed()
    counts = {float(on_cpu(e["step"])) for e in optimizer.state_dict()["state"].values()}
    return Captured(relative(flat(model), end), counts, len(graphs), count)


def _still() -> tuple[nn.Module, Tensor]:
    """A model whose gradients stay where they are, and a rate."""
    model = move(net())
    for p in model.parameters():
        p.grad = to_device(torch.zeros(p.shape, dtype=p.dtype))
    return model, to_device(torch.tensor(0.003, dtype=torch.float64))


def _renew(model: nn.Module, rate: Tensor, factor: float = 1.0) -> None:
    for p in model.parameters():
        on_cpu(p.grad).copy_(factor * torch.randn(p.shape, dtype=p.dtype))
    on_cpu(rate).mul_(0.9)


def _capture(model: nn.Module, optimizer: Any, count: Count) -> Graph:
    graph, entries = Graph(), [t for e in optimizer.state.values() for t in e.values()]
    memory = [on_cpu(t) for t in (*model.parameters(), *entries)]
    before = [t.clone() for t in memory]
    with METER.into(count), graph.capture():
        optimizer.step()
    for t, value in zip(memory, before, strict=True):
        t.copy_(value)
    return graph


def where_steps_are_counted(name: str) -> tuple[list[str], bool]:
    """The devices of the counts of optimizers that loaded one another's state, capturable or not; whether all end alike."""
    where, ends = [], []
    saved, start = None, None
    for capturable in (True, False, True):
        torch.manual_seed(0)
        model, rate = _still()
        optimizer = EVERY[name](model, lr=rate, capturable=capturable)
        if saved is not None:
            model.load_state_dict(start)
            saved["param_groups"][0]["capturable"] = capturable  # as torch's, it is loaded with the groups
            optimizer.load_state_dict(saved)
        for _ in range(4):
            _renew(model, rate)
            optimizer.step()
        ends.append(flat(model))
        where += {str(e["step"].device) for e in optimizer.state.values()}
        if saved is None:
            saved, start = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    return where, relative(ends[1], ends[2]) < 1e-12 and {float(on_cpu(e["step"])) for e in optimizer.state.values()} == {8.0}


def uncapturable() -> None:
    """What is captured though it was not made for it."""
    model, rate = _still()
    optimizer = precond.adamw(model, lr=rate)
    optimizer.step()
    with Graph().capture():
        optimizer.step()


def kahan() -> tuple[bool, list[str]]:
    """AdamW on 16-bit parameters with compensation: whether it ends as on the CPU, and what strayed."""
    ends = []
    strayed: list[str] = []
    for device in ("cpu", "cuda"):
        twins = Twins(net(torch.bfloat16), device)
        training = Training(twins, precond.adamw(twins.model, lr=1e-3, rounding="kahan"))
        training.steps(batches(6, torch.bfloat16))
        ends.append(training.end)
        strayed += training.strayed
    return torch.equal(*ends), strayed


def offloaded(recipe: str) -> tuple[float, Count]:
    """How far a training ends from the CPU's, and what it did, where parameters stay on the CPU, and stand on the device in the forward alone.

    So does FSDP2 with ``CPUOffloadPolicy``: gradients come to the CPU, here the twin's own, and inputs are seen on the device.
    """
    torch.manual_seed(0)
    here = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    away, count = copy.deepcopy(here), Count()
    for layer in (away[0], away[2]):
        kept = dict(layer.named_parameters())

        def put(module: nn.Module, args: Any, kept: dict[str, Tensor] = kept) -> None:
            module._parameters.update({name: p.to("cuda") for name, p in kept.items()})  # type: ignore[misc]

        layer.register_forward_pre_hook(put)
        layer.register_forward_hook(lambda module, args, out, kept=kept: module._parameters.update(kept))
    optimizers = [getattr(precond, recipe)(model, lr=0.01) for model in (here, away)]
    for k in range(10):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(k)) * 2 + 1
        for optimizer in optimizers:
            optimizer.zero_grad()
        here(x).square().mean().backward()
        with METER.into(count):
            away(to_device(x))
        for p, q in zip(here.parameters(), away.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        with METER.into(count):
            for optimizer in optimizers:
                optimizer.step()
    return max(float((p - q).detach().abs().max()) for p, q in zip(here.parameters(), away.parameters(), strict=True)), count
