"""Times as ratios of one run: the candidates take turns, so that what slows the machine slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

MLP = [(512, 784), (512,), (512, 512), (512,), (10, 512), (10,)]
TRANSFORMER = [
    shape
    for _ in range(6)
    for shape in [
        (384,), (384,), (1152, 384), (1152,), (384, 384), (384,), (384,), (384,), (1536, 384), (1536,), (384, 1536), (384,)
    ]
]  # fmt: skip


def _resnet18() -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    width = 64
    for out in (64, 128, 256, 512):
        for block in range(2):
            shapes += [(out, width if block == 0 else out, 3, 3), (out,), (out,), (out, out, 3, 3), (out,), (out,)]
            if block == 0 and out != width:
                shapes += [(out, width, 1, 1), (out,), (out,)]
        width = out
    return [*shapes, (1000, 512), (1000,)]


SHAPES: dict[str, list[tuple[int, ...]]] = {
    "MLP 784-512-512-10": MLP,
    "ResNet-18": _resnet18(),
    "transformer 6×384": TRANSFORMER,
}


def parameters(shapes: Sequence[tuple[int, ...]], seed: int = 0) -> list[nn.Parameter]:
    """Parameters with random values and gradients."""
    generator = torch.Generator().manual_seed(seed)
    out = [nn.Parameter(torch.randn(s, generator=generator) * 0.05) for s in shapes]
    for p in out:
        p.grad = torch.randn(p.shape, generator=generator) * 1e-2
    return out


def convnet() -> nn.Module:
    """Two convolutions and a linear layer on 28×28 images."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(1568, 10))


def take_turns(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int = 60,
    warm: int = 5,
    mean: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median (or mean, where some steps do more than others) seconds over rounds in which all take their turn.

    On one thread with ``time.process_time`` for a clock, other load hardly counts.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(warm):
        for f in candidates.values():
            f()
    for _ in range(rounds):
        for name, f in candidates.items():
            start = clock()
            f()
            times[name].append(clock() - start)
    middle = statistics.fmean if mean else statistics.median
    return {name: middle(t) for name, t in times.items()}


def copy_bandwidth(numel: int) -> float:
    """Bytes per second of a copy, read and write counted, of as many float32 numbers."""
    source, target = torch.randn(numel), torch.empty(numel)
    seconds = take_turns({"copy": lambda: target.copy_(source)}, rounds=40)["copy"]
    return 8 * numel / seconds


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of state tensors with more than one element, in whatever lists, dictionaries and objects a peer keeps them."""
    found: dict[int, Tensor] = {}
    visited: set[int] = {id(p) for group in optimizer.param_groups for p in group["params"]}

    def walk(x: object) -> None:
        if id(x) in visited:
            return
        visited.add(id(x))
        if isinstance(x, Tensor):
            if x.numel() > 1:
                found[x.data_ptr()] = x
        elif isinstance(x, Mapping):
            for y in x.values():
                walk(y)
        elif isinstance(x, list | tuple):
            for y in x:
                walk(y)
        elif hasattr(x, "__dict__"):
            walk(vars(x))

    for entries in optimizer.state.values():
        walk(entries)
    return sum(t.numel() * t.element_size() for t in found.values())


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as a Markdown table; the first is the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])
