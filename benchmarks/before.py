"""Every row of the other benchmarks with this source and with an earlier one: CPU time of a step, and the ratio.

python benchmarks/before.py --old PATH [--rounds 100] [--only whitening,auto]

PATH is a checkout, as ``git worktree add PATH COMMIT`` makes it. Both versions are imported into one process, on one thread, and take turns
step by step: what slows the machine slows both.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
OWN = ("precond", "step", "matrices", "training")  # packages and scripts of which each version has its own


class Version:
    """A source, imported apart from others."""

    def __init__(self, root: Path):
        self._source, self._modules = str(root / "src"), dict[str, ModuleType]()
        self._finders = list(sys.meta_path)
        with self.active():
            self.precond: Any = importlib.import_module("precond")
            self.step, self.matrices, self.training = map(importlib.import_module, OWN[1:])
        if not Path(self.precond.__file__).is_relative_to(root.resolve()):
            raise SystemExit(f"precond was imported from {self.precond.__file__}, not from {root}")

    @contextmanager
    def active(self) -> Iterator[None]:
        """Imports inside are its own, those in functions too."""
        others, finders = _taken_out(), sys.meta_path[:]
        sys.modules |= self._modules
        sys.meta_path[:] = self._finders
        sys.path.insert(0, self._source)
        try:
            yield
        finally:
            sys.path.remove(self._source)
            self._modules, self._finders = _taken_out(), sys.meta_path[:]
            sys.modules |= others
            sys.meta_path[:] = finders


def _taken_out() -> dict[str, ModuleType]:
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in OWN}


Step = Callable[[Callable[[], float]], float]
"""A step, by a clock."""


def plain(step: Callable[[], object]) -> Step:
    def timed(clock: Callable[[], float]) -> float:
        start = clock()
        step()
        return clock() - start

    return timed


def rows(v: Version) -> Mapping[tuple[str, str, int], Callable[[], Step]]:
    """What makes the steps of each row: (shapes, recipe, how many steps are a period)."""
    from harness import SHAPES, parameters

    p, t, out = v.precond, v.training, {}
    for label, shapes in (SHAPES | v.step.SMALL).items():
        for name in v.step.PASSES:
            out[label, name, 1] = lambda name=name, shapes=shapes: plain(p.RECIPES[name](parameters(shapes), lr=1e-3).step)
    for label, shapes in v.step.MATRICES.items():
        out[label, "muon", 1] = lambda shapes=shapes: plain(p.muon(parameters(shapes), lr=1e-3).step)
    peers = ("heavyball", "pytorch-optimizer", "torch ", "(fused)")
    for name, make in v.matrices.CANDIDATES.items():
        if not any(peer in name for peer in peers):
            out["transformer 6×384", name, 10] = lambda make=make: v.matrices.Steps(make)
    images, labels = torch.rand(t.BATCH, 1, 28, 28), torch.randint(0, 10, (t.BATCH,))
    characters = torch.randint(0, 96, (16, 65))
    data = {
        "MLP 784-300-100-10": (t.mlp, images, labels),
        "conv net": (t.convnet, images, labels),
        "transformer 2×128": (t.Transformer, characters[:, :-1], characters[:, 1:]),
    }
    makers = {
        "bnp": lambda m: p.bnp(m, lr=1e-3),
        "adamw behind BNP": lambda m: p.adamw(m, lr=1e-4, inputs=p.BNP()),
        "whitening": lambda m: p.whitening(m, lr=1e-4),
        "whitening, Cholesky": t.cholesky,
        "auto": lambda m: p.auto(m, lr=1e-4),
        "soap": lambda m: p.soap(m, lr=1e-4),
        "shampoo": lambda m: p.shampoo(m, lr=1e-4),
    }
    for label, (build, x, y) in data.items():
        for name, make in makers.items():
            out[f"{label}, whole step", name, 100] = lambda b=build, make=make, x=x, y=y: plain(t.step_of(b(), make, x, y))
    return out


def compared(new: Version, old: Version, key: tuple[str, str, int], rounds: int) -> tuple[float, float, float]:
    """Milliseconds of both (means), and the ratio: of one period the mean, of several the median."""
    steps = []
    for v in (new, old):
        with v.active():
            torch.manual_seed(0)
            steps.append(rows(v)[key]())
    period = key[2]
    times: tuple[list[float], list[float]] = ([], [])
    for k in range(period + 10 + -(-rounds // period) * period):
        for v, step, own in zip((new, old), steps, times, strict=True):
            with v.active():
                seconds = step(time.process_time)
            if k >= period + 10:
                own.append(seconds)
    a, b = ([statistics.fmean(x[i : i + period]) for i in range(0, len(x), period)] for x in times)
    return 1e3 * statistics.fmean(a), 1e3 * statistics.fmean(b), statistics.median(x / y for x, y in zip(a, b, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--old", type=Path, required=True, help="a checkout of the earlier source")
    parser.add_argument("--rounds", type=int, default=100, help="steps of each, at least; whole refresh periods are taken")
    parser.add_argument("--only", default="", help="rows whose names hold one of these, commas between")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sys.path.insert(0, str(HERE))
    new, old = Version(HERE.parent), Version(options.old)
    print("| shapes | recipe | ms | before | ratio |\n|---|---|---|---|---|")
    for key in rows(new):
        if any(part.strip() in f"{key[0]} {key[1]}".lower() for part in options.only.lower().split(",")):
            ours, before, ratio = compared(new, old, key, options.rounds)
            print(f"| {key[0]} | {key[1]} | {ours:.3f} | {before:.3f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
