"""What the steps of an optimizer cost on the pretended device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

import precond
from device.gpt import GPT
from device.meter import METER, Count
from device.pretended import Pretended, move, to_device

STEPS, COUNTED = 20, 10
Make = Callable[[nn.Module], torch.optim.Optimizer]


@dataclass(frozen=True)
class Step:
    """One step: what ``probe()`` and ``step()`` did, what the hooks did in the forwards before, and bytes at the peak."""

    own: Count
    hooks: Count
    peak: int


@dataclass(frozen=True)
class Cost:
    """The counted steps of a training."""

    steps: tuple[Step, ...]
    parameters: int

    @property
    def hooks(self) -> float:
        """Launches in hooks, mean over steps: which forwards are observed depends on the step."""
        return fmean(s.hooks.launches.total() for s in self.steps)

    @property
    def launches(self) -> float:
        """Of the typical step (the upper median), hooks included."""
        return sorted(s.own.launches.total() for s in self.steps)[len(self.steps) // 2] + self.hooks

    @property
    def worst(self) -> float:
        """The most that a step launches with its hooks, by the typical one."""
        return max(s.own.launches.total() + s.hooks.launches.total() for s in self.steps) / self.launches

    @property
    def reads(self) -> int:
        """The most that a step with its hooks waits for the device."""
        return max(s.own.reads.total() + s.hooks.reads.total() for s in self.steps)

    @property
    def mixed(self) -> int:
        """Calls on tensors of several devices, in all steps."""
        return sum(c.mixed.total() + c.scattered.total() for s in self.steps for c in (s.own, s.hooks))

    @property
    def copies(self) -> int:
        """The most that a step copies between host and device."""
        return max(_copies(s.own) + _copies(s.hooks) for s in self.steps)

    @property
    def solvers(self) -> int:
        """The most calls of solvers in a step: one launch each here, dozens on a device."""
        return max(s.own.solvers.total() for s in self.steps)

    @property
    def temporaries(self) -> float:
        """Bytes a parameter that the typical step needs beside what it found."""
        return sorted(s.peak for s in self.steps)[len(self.steps) // 2] / self.parameters

    @property
    def worst_temporaries(self) -> float:
        """The most, by the typical step's; 1 where no step has any."""
        peaks = sorted(s.peak for s in self.steps)
        return peaks[-1] / typical if (typical := peaks[len(peaks) // 2]) else 1.0

    def where(self, what: str) -> Counter[str]:
        """Of ``"launches"``, ``"reads"``, …: which operations, in all counted steps."""
        return sum((getattr(c, what) for s in self.steps for c in (s.own, s.hooks)), Counter())


def _copies(count: Count) -> int:
    return count.copies_in.total() + count.copies_out.total()


@contextmanager
def metered_hooks(model: nn.Module, count: Count) -> Iterator[None]:
    """Charge what hooks do on a module's inputs and outputs, and nothing else of a forward."""

    def metered(hook: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with METER.into(count):
                return hook(*args, **kwargs)

        return run

    tables = [hooks for m in model.modules() for hooks in (m._forward_pre_hooks, m._forward_hooks)]
    originals = [dict(hooks) for hooks in tables]
    for hooks, original in zip(tables, originals, strict=True):
        hooks.update({key: metered(hook) for key, hook in original.items()})
    try:
        yield
    finally:
        for hooks, original in zip(tables, originals, strict=True):
            hooks.update({key: hook for key, hook in original.items() if key in hooks})


class Driver:
    """Gives an optimizer inputs and gradients of a seed, step after step."""

    def __init__(self, make: Make, model: nn.Module | None = None):
        torch.manual_seed(0)
        self.model = move(GPT() if model is None else model)
        self.generator = torch.Generator().manual_seed(1)
        self.lasting = [0.05 * self._draw(p) for p in self.model.parameters()]
        self.optimizer = make(self.model)

    def _draw(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator)

    def _pass(self, hooks: Count) -> None:
        """A forward, where anyone looks at it, and gradients: one direction that lasts, and noise."""
        if getattr(self.optimizer, "observes", False):
            shape, vocabulary = (2, len(self.model.positions.weight)), len(self.model.tokens.weight)
            with metered_hooks(self.model, hooks):
                self.model(to_device(torch.randint(vocabulary, shape, generator=self.generator)))
        for p, lasting in zip(self.model.parameters(), self.lasting, strict=True):
            p.grad = Pretended(lasting + 0.01 * self._draw(p), p.device)

    def step(self) -> Step:
        own, hooks = Count(), Count()
        self._pass(hooks)
        before = METER.mark()
        if isinstance(self.optimizer, precond.PreconditionedGD):
            while self._probe(own):
                self._pass(hooks)
        with METER.into(own):
            self.optimizer.step()
        return Step(own, hooks, METER.peak - before)

    def _probe(self, own: Count) -> bool:
        with METER.into(own):
            return self.optimizer.probe()


def cost(make: Make, model: nn.Module | None = None) -> Cost:
    """Twenty steps on the GPT, of which the last ten count."""
    driver = Driver(make, model)
    steps = [driver.step() for _ in range(STEPS)]
    return Cost(tuple(steps[-COUNTED:]), sum(p.numel() for p in driver.model.parameters()))
