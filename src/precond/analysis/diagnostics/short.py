"""Short trainings of copies: what a range test, a trial of remedies and the calibration study are made of."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from precond.analysis.curvature import Objective
from precond.analysis.curvature.batches import checked, moved
from precond.analysis.curvature.isolation import in_mode
from precond.analysis.curvature.objective import depending
from precond.optim.optimizer import PreconditionedGD
from precond.optim.optimizer.closures import LossClosure

Make = Callable[[nn.Module, float], torch.optim.Optimizer]
"""(model, learning rate) ↦ optimizer."""
Watch = Callable[[str, int, float], None]
"""Sees what is trained, the steps done and the loss; raises to stop."""


@dataclass(frozen=True)
class Curve:
    """One short training.

    Attributes:
        lr: learning rate.
        steps: after how many steps the loss was measured, from 0.
        losses: of the objective, in evaluation mode; fewer where it diverged.
        why: it ended early, in words; ``""`` where it did not.
    """

    lr: float
    steps: tuple[int, ...]
    losses: tuple[float, ...]
    why: str = ""

    @property
    def final(self) -> float:
        """The last loss; infinite where it diverged."""
        return math.inf if self.why else self.losses[-1]

    @property
    def lowest(self) -> float:
        """On the way."""
        return min(self.losses)

    def reaches(self, goal: float) -> float:
        """Steps to a loss, between two measurements by a straight line; infinite where it is not reached."""
        before, at = self.losses[0], 0
        for step, loss in zip(self.steps, self.losses, strict=False):
            if loss <= goal:
                share = 1.0 if before == loss else (before - goal) / (before - loss)
                return at + min(max(share, 0.0), 1.0) * (step - at)
            before, at = loss, step
        return math.inf

    def until(self, steps: int) -> Curve:
        """Its first steps."""
        kept = [i for i, step in enumerate(self.steps[: len(self.losses)]) if step <= steps]
        cut = bool(self.why) and self.steps[len(self.losses) - 1] < steps
        return Curve(self.lr, tuple(self.steps[i] for i in kept), tuple(self.losses[i] for i in kept), self.why if cut else "")


def compared(now: Sequence[Curve], then: Sequence[Curve], horizon: int) -> tuple[float, tuple[float, float]]:
    """The ratio of steps to the loss that the slower of both reaches at its best rate, and the rates at which each is there first."""
    before, after = [c.until(horizon) for c in now], [c.until(horizon) for c in then]
    goal = max(min(c.lowest for c in before), min(c.lowest for c in after))
    slow, fast = (min(many, key=lambda c: c.reaches(goal)) for many in (before, after))
    # Less than one step is none that anyone saves.
    return max(slow.reaches(goal), 1.0) / max(fast.reaches(goal), 1.0), (slow.lr, fast.lr)


def points(steps: int, count: int = 20) -> tuple[int, ...]:
    """About so many steps at equal distances, 0 and the last one among them.

    Example:
        >>> points(10, 4)
        (0, 2, 5, 8, 10)
    """
    return tuple(sorted({round(i * steps / count) for i in range(count + 1)}))


def short_training(
    objective: Objective,
    make: Make,
    lr: float,
    steps: int,
    *,
    at: Iterable[int] | None = None,
    seed: int = 0,
    watch: Callable[[int, float], None] | None = None,
) -> Curve:
    """Train a copy of the objective's model on its batches in turn, in training mode.

    Args:
        objective: what is minimized and what measures; untouched.
        make: (model, lr) ↦ optimizer.
        lr: learning rate.
        steps: as many, unless the loss is no number or exceeds ten times its first value and one more.
        at: when the objective is measured; None: at :func:`points`.
        seed: of dropout and of whatever else draws.
        watch: called after each step with its number and the batch's loss.
    """
    wanted = points(steps) if at is None else tuple(at)
    with trained_copy(objective, seed) as mine:
        optimizer = make(mine.model, lr)
        losses = [_measured(mine)]
        limit = 10 * abs(losses[0]) + 1
        for step in range(1, steps + 1):
            try:
                value = one_step(mine, optimizer, (step - 1) % len(mine.batches))
            except FloatingPointError as error:
                return Curve(lr, wanted, tuple(losses), f"step {step}: {error}")
            if not value <= limit:
                return Curve(lr, wanted, tuple(losses), f"diverged at step {step}")
            if watch is not None:
                watch(step, value)
            if step in wanted:
                losses.append(_measured(mine))
                if not losses[-1] <= limit:
                    return Curve(lr, wanted, tuple(losses[:-1]), f"diverged at step {step}")
        return Curve(lr, wanted, tuple(losses))


def one_step(objective: Objective, optimizer: torch.optim.Optimizer, index: int) -> float:
    """One step of the objective's own model on a batch, and the loss before it."""
    if isinstance(optimizer, PreconditionedGD):  # which may need a second gradient
        return float(optimizer.step(LossClosure(lambda: training_loss(objective, index))))
    optimizer.zero_grad()
    loss = training_loss(objective, index)
    loss.backward()
    found = float(loss.detach())
    if math.isfinite(found):
        optimizer.step()
    return found


def training_loss(objective: Objective, index: int) -> Tensor:
    """The loss of a batch with a graph, in the model's present mode."""
    batch = checked(objective.batches[index], index)
    inputs, targets = moved(batch, objective.device, objective.dtype)
    within = getattr(objective, "loss_of", None)
    loss: Tensor = within(inputs, index) if within is not None else objective.loss_fn(_called(objective.model, inputs), targets)
    return depending(loss.reshape(()))


def _called(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


@contextmanager
def as_trained(objective: Objective) -> Iterator[Objective]:
    """The objective in evaluation mode, but batch normalizations with the statistics of the batch, which is what training sees.

    The running ones of a fresh model are those of nothing. An objective with another mode than ``"eval"`` stays as it is.
    """
    norms = [m for m in objective.model.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.track_running_stats]
    if objective.mode != "eval" or not norms:
        yield objective
        return
    with in_mode(objective.model, "eval"):
        for m in norms:
            m.training = True
        other = copy.copy(objective)
        other.mode = "unchanged"
        yield other


def _measured(objective: Objective) -> float:
    with as_trained(objective) as seen:
        return seen.value()


@contextmanager
def trained_copy(objective: Objective, seed: int) -> Iterator[Objective]:
    """The objective of a copy of its model, in training mode, with random numbers of its own."""
    mine = copy.copy(objective)
    modules = (objective.model, objective.loss_fn) if isinstance(objective.loss_fn, nn.Module) else (objective.model,)
    mine.model, *loss = copy.deepcopy(modules)
    if loss:
        mine.loss_fn = loss[0]
    named = dict(mine.model.named_parameters(remove_duplicate=False))
    mine.params = tuple(named[name] for name in mine.names)
    mine.model.train()
    with torch.random.fork_rng([d for d in {p.device.index for p in mine.params} if d is not None]), torch.enable_grad():
        torch.manual_seed(seed)
        yield mine
