"""Loss and metric of a model on a part of the data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn

from precond.lab.workloads.problem import Problem
from precond.lab.workloads.randomness import random_states, restore_random_states

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Score:
    """Mean loss, and accuracy or R² (NaN where the problem has no metric)."""

    loss: float
    metric: float = math.nan


def evaluate(problem: Problem, part: str) -> Score:
    """The score of the model in evaluation mode on a part; random generators and the model's mode are left as they were.

    The loss is the mean over examples (each batch weighs by its size). R² = 1 − Σ‖y − ŷ‖²/Σ‖y − ȳ‖².
    """
    model, before = problem.model, random_states()
    was_training = model.training
    model.eval()
    count = 0
    loss = hits = residual = square = 0.0
    total = torch.zeros((), dtype=torch.float64)
    try:
        with torch.no_grad():
            for inputs, targets in problem.parts[part].once():
                outputs = model(inputs)
                count += len(targets)
                loss += problem.loss_fn(outputs, targets).item() * len(targets)
                if problem.metric == "accuracy":
                    # Targets may have more dimensions than one (sequences): a hit counts by its share of the example.
                    hits += (outputs.argmax(1) == targets).double().mean().item() * len(targets)
                elif problem.metric == "R²":
                    y = targets.double()
                    residual += (y - outputs.double()).square().sum().item()
                    square += y.square().sum().item()
                    total = total + y.sum(0).cpu()
    finally:
        model.train(was_training)
        restore_random_states(before)
    if not count:
        raise ValueError(f"the {part} part holds no examples")
    if problem.metric == "accuracy":
        return Score(loss / count, hits / count)
    if problem.metric == "R²":
        spread = square - (total.square().sum() / count).item()
        return Score(loss / count, 1 - residual / spread if spread > 0 else math.nan)
    return Score(loss / count)


@contextmanager
def renewed_statistics(problem: Problem, batches: int = 16) -> Iterator[None]:
    """Within it running statistics of batch normalization are of the first batches, as the weights are now; after it, as they were.

    Those of training belong to other weights than an average of them.
    """
    norms: list[Any] = [m for m in problem.model.modules() if isinstance(m, _BATCH_NORMS)]
    before = [(m.momentum, {name: b.clone() for name, b in m.named_buffers()}) for m in norms]
    try:
        if norms:
            _renew(problem, norms, batches)
        yield
    finally:
        for m, (momentum, buffers) in zip(norms, before, strict=True):
            m.momentum = momentum
            for name, b in m.named_buffers():
                b.copy_(buffers[name])


def _renew(problem: Problem, norms: Sequence[Any], batches: int) -> None:
    model, random, training = problem.model, random_states(), problem.model.training
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # the mean over batches
    model.train()
    try:
        with torch.no_grad():
            for inputs, _ in islice(problem.parts["train"].epoch(0), batches):
                model(inputs)
    finally:
        model.train(training)
        restore_random_states(random)
