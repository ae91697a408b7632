"""Whether a learning rate transfers: the best one of each width and depth of one kind of net, on the same data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean

import torch.nn.functional as F
from torch import Tensor, nn

from precond.lab.workloads import peers
from precond.lab.workloads.catalog import load_data
from precond.lab.workloads.data import Part
from precond.lab.workloads.entrant import Entrant, Peer
from precond.lab.workloads.problem import Tensors
from precond.lab.workloads.search import LogUniform, Search, Trial
from precond.lab.workloads.study import Contender, Task
from precond.lab.workloads.syntax import parse_recipe
from precond.lab.workloads.training import Plan

WIDTHS, DEPTHS = (64, 128, 256, 512, 1024), (2, 4, 8)
"""Widths at the least depth, and depths at width 128."""

_WIDTH = 128
TRIALS, SEEDS = 6, (0, 1)
STEPS = 60

RULES = (
    "The same digits, batches of 64, steps, warm-up and linear decay for all. The loss is the final one on training examples. Each rate of a "
    "search is twice the one before; where the best lies at an end, up to two more beyond it. The best rate is the minimum of the parabola "
    "through the lowest loss and its neighbors, over the logarithm of the rate, means over seeds.",
)


class Tower(nn.Module):
    """Residual blocks x ↦ x + W relu(LN(x)) behind a first layer, and a last one: (N, features) ↦ (N, classes)."""

    def __init__(self, features: int, width: int, depth: int, classes: int) -> None:
        super().__init__()
        self.first = nn.Linear(features, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(F.relu(norm(x)))
        return self.head(x)


def _entrants() -> tuple[tuple[Entrant, float], ...]:
    """Who, and where its rates begin."""
    return (
        (Peer("torch AdamW", peers.adamw, "torch-adamw"), 5e-4),
        (Peer("torch Muon", peers.muon, "torch-muon"), 1e-3),
        (parse_recipe("auto", "auto"), 2.5e-3),
    )


def shape_name(width: int, depth: int) -> str:
    """Part of a task's name."""
    return f"width {width}, depth {depth}"


def transfer_tasks(
    seeds: Iterable[int], trials: int, scale: float = 1.0, folder: Path | None = None, examples: int | None = None
) -> tuple[Task, ...]:
    """One task for each width or depth and each seed, whose searches are what is reported.

    Args:
        seeds: of the searches.
        trials: rates of each, over a range of 2 to this power.
        scale: times 60 steps.
        folder: none: digits come with scikit-learn.
        examples: train on the first so many; None: on all.

    Raises:
        ImportError: where scikit-learn is not installed.
        ValueError: where a folder is given.
    """
    if folder is not None:
        raise ValueError(f"digits come with scikit-learn; leave out the data folder, got {folder}")
    data = load_data("digits")
    parts = {name: Part(part.inputs.flatten(1) / 16, part.targets) for name, part in data.parts.items()}
    parts["train"] = Part(parts["train"].inputs[:examples], parts["train"].targets[:examples])
    steps = max(2, round(scale * STEPS))

    def workload(width: int, depth: int) -> Tensors:
        words = f"residual blocks with pre-LayerNorm, {shape_name(width, depth)}"
        return Tensors(
            "digits", data.about, parts, partial(Tower, 64, width, depth, 10), F.cross_entropy, "accuracy", 64, 512, words, "cross entropy"
        )  # fmt: skip

    def task(width: int, depth: int, seed: int) -> Task:
        make: Callable[[], Tensors] = partial(workload, width, depth)
        contenders = tuple(Contender(e, make, LogUniform(low / 2**0.5, low * 2 ** (trials - 0.5))) for e, low in _entrants())
        return Task(
            f"{shape_name(width, depth)}, seed {seed}", contenders, Plan(None, steps, 0, "linear", steps // 20, 2), (seed,),
            Search(trials, judge="training", evaluations=1, beyond=2), search_seed=1000 + seed, metric="accuracy", facts=make().facts,
        )  # fmt: skip

    shapes = dict.fromkeys([*((w, DEPTHS[0]) for w in WIDTHS), *((_WIDTH, d) for d in DEPTHS)])
    chosen = tuple(seeds)
    return tuple(task(width, depth, seed) for width, depth in shapes for seed in chosen)


def mean_losses(searches: Sequence[Sequence[Trial]]) -> dict[float, float]:
    """Rate ↦ mean of the final losses of all searches, in order, of rates that all tried and that diverged in none."""
    losses = [{trial.lr: trial.loss for trial in search if math.isfinite(trial.loss)} for search in searches]
    rates = sorted(set.intersection(*map(set, losses))) if losses else []
    return {lr: fmean(found[lr] for found in losses) for lr in rates}


def best_rate(searches: Sequence[Sequence[Trial]]) -> float:
    """The minimum of the parabola through the lowest mean loss and its two neighbors, over ln of the rate; at an end that rate itself.

    Args:
        searches: one for each seed; rates that all tried, and that diverged in none, count.

    Returns:
        NaN where there is none.

    Example:
        >>> valley = [Trial(lr, 1 + math.log(lr / 0.03) ** 2) for lr in (0.01, 0.02, 0.04, 0.08)]
        >>> round(best_rate([valley, valley]), 6)
        0.03
    """
    losses = mean_losses(searches)
    rates, means = list(losses), list(losses.values())
    if not rates:
        return math.nan
    i = means.index(min(means))
    if i in (0, len(rates) - 1):
        return rates[i]
    x, y = [math.log(lr) for lr in rates[i - 1 : i + 2]], means[i - 1 : i + 2]
    left, right = (y[1] - y[0]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])
    curvature = (right - left) / (x[2] - x[0])
    return math.exp((x[0] + x[1]) / 2 - left / (2 * curvature)) if curvature > 0 else rates[i]
