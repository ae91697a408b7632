"""Five partial differential equations by physics-informed networks in float64: natural gradient steps, Adam and SOAP, at equal CPU seconds.

Each method has the same network, points and CPU time of one thread; learning rates of Adam and SOAP are those of the smallest loss on a seed
of its own, decayed by half a cosine. What is compared is the relative L2 error on points of which nobody was told. Runs that are
done are kept in experiments/pinns/results.json and not made again.

python benchmarks/pinns.py [--seconds 20] [--seeds 1] [--only heat wave] [--table]
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.metadata
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import table
from torch import Tensor, nn
from torch.func import grad, hessian

from precond.analysis.curvature import Equation, Residuals, natural_steps
from precond.lab.workloads import write_atomically

RESULTS = Path(__file__).parent.parent / "experiments" / "pinns" / "results.json"
RATES = (1e-2, 3e-3, 1e-3)
TUNING_SEED = 100
π = math.pi


@dataclass(frozen=True)
class Problem:
    """A differential equation on [0, 1]^d, whose last coordinate is time where there is one.

    Attributes:
        dims: d.
        exact: its solution, of points (m, d).
        equation: its residual at one point inside.
        faces: pairs (coordinate, value): where the solution is given; time has no end.
        speed: whether ∂u/∂t is given at the start too (it is zero).
    """

    dims: int
    exact: Callable[[Tensor], Tensor]
    equation: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]
    faces: tuple[tuple[int, float], ...]
    speed: bool = False


def slope(u: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return grad(lambda x: u(x).sum())(x)


def second(u: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return hessian(lambda x: u(x).sum())(x).diagonal()


def all_faces(dims: int) -> tuple[tuple[int, float], ...]:
    return tuple((i, v) for i in range(dims) for v in (0.0, 1.0))


_NU = 0.1


def _burgers(u: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    d = slope(u, x)
    return d[1] + u(x).sum() * d[0] - _NU * second(u, x)[0]


def _wave(u: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    s = second(u, x)
    return s[1] - s[0]


IN_TIME = ((0, 0.0), (0, 1.0), (1, 0.0))
PROBLEMS = {
    "Poisson, 2 dimensions": Problem(
        2,
        lambda x: (π * x).sin().prod(1),
        lambda u, x: second(u, x).sum() + 2 * π**2 * (π * x).sin().prod(),
        all_faces(2),
    ),
    "Poisson, 5 dimensions": Problem(
        5, lambda x: (π * x).cos().sum(1), lambda u, x: second(u, x).sum() + π**2 * (π * x).cos().sum(), all_faces(5)
    ),
    "heat": Problem(
        2,
        lambda x: (-(π**2) * x[:, 1] / 4).exp() * (π * x[:, 0]).sin(),
        lambda u, x: slope(u, x)[1] - second(u, x)[0] / 4,
        IN_TIME,
    ),
    "wave": Problem(2, lambda x: (π * x[:, 0]).sin() * (π * x[:, 1]).cos(), _wave, IN_TIME, speed=True),
    "Burgers": Problem(2, lambda x: (1 - ((x[:, 0] - x[:, 1] / 2) / (4 * _NU)).tanh()) / 2, _burgers, IN_TIME),
}


def built(problem: Problem, seed: int) -> tuple[nn.Module, Residuals, Callable[[], float]]:
    """The network, its residuals at random points, and its error at others."""
    generator = torch.Generator().manual_seed(seed)
    random = lambda m: torch.rand(m, problem.dims, generator=generator, dtype=torch.float64)  # noqa: E731
    torch.manual_seed(seed)
    layers = [nn.Linear(problem.dims, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)]
    model = nn.Sequential(*layers).double()
    each = 120 // len(problem.faces)
    sides = []
    for i, value in problem.faces:
        points = random(each)
        points[:, i] = value
        sides.append(points)
    boundary = torch.cat(sides)
    values = problem.exact(boundary)
    # A point's own value travels with it, so that the residual is a function of one point.
    with_values = torch.cat([boundary, values[:, None]], 1)
    equations = [
        Equation(problem.equation, random(600)),
        Equation(lambda u, x: u(x[:-1]) - x[-1], with_values, weight=10.0),
    ]
    if problem.speed:
        start = random(40)
        start[:, -1] = 0
        equations.append(Equation(lambda u, x: slope(u, x)[-1], start, weight=10.0))
    test = torch.rand(4000, problem.dims, generator=torch.Generator().manual_seed(10**6), dtype=torch.float64)
    truth = problem.exact(test)

    def error() -> float:
        with torch.no_grad():
            return float((model(test)[:, 0] - truth).norm() / truth.norm())

    return model, Residuals(model, equations), error


def first_order(make: Callable[[Any], torch.optim.Optimizer], residuals: Residuals, lr: float, seconds: float) -> int:
    """Steps of an optimizer until its CPU seconds are over."""
    optimizer = make(residuals.params)
    start, steps = time.process_time(), 0
    while (spent := time.process_time() - start) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 + math.cos(π * spent / seconds)) / 2
        optimizer.zero_grad()
        residuals.loss().backward()
        optimizer.step()
        steps += 1
    return steps


def natural(residuals: Residuals, seconds: float) -> int:
    """Natural steps, as they come, until their CPU seconds are over."""
    start, steps = time.process_time(), 0
    for _ in natural_steps(residuals):
        steps += 1
        if time.process_time() - start >= seconds:
            break
    return steps


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params)


def soap(params: Any) -> torch.optim.Optimizer:
    from pytorch_optimizer import SOAP

    return SOAP(params, weight_decay=0.0)


def run(name: str, method: str, seed: int, seconds: float, lr: float | None = None) -> dict[str, Any]:
    """One run, from a fresh network."""
    _, residuals, error = built(PROBLEMS[name], seed)
    residuals.loss().backward()  # whatever is set up once is not a method's own time
    start = time.process_time()
    if lr is None:
        steps = natural(residuals, seconds)
    else:
        steps = first_order({"Adam": adam, "SOAP": soap}[method], residuals, lr, seconds)
    spent = time.process_time() - start
    return {"loss": residuals.loss().item(), "error": error(), "steps": steps, "seconds": spent, "lr": lr}


def read() -> dict[str, Any]:
    """What is known."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {"runs": {}}


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time."""
    at = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(at, fcntl.LOCK_EX)
        yield
    finally:
        os.close(at)


def kept(key: str, f: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A run that is known, or made now and kept; other processes may add some meanwhile."""
    known = read()["runs"]
    if key in known:
        return known[key]
    print(key, file=sys.stderr, flush=True)
    made = f()
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with locked(RESULTS.parent):
        all_runs = read()
        all_runs["versions"] = {name: importlib.metadata.version(name) for name in ("torch", "pytorch_optimizer")}
        all_runs["runs"][key] = made
        write_atomically(RESULTS, json.dumps(all_runs, indent=1, ensure_ascii=False) + "\n")
    return made


def study(seconds: float, seeds: int, names: list[str]) -> None:
    """All runs that are not there yet, each kept as soon as it is done."""
    for seed in range(seeds):
        for name in names:
            for method in ("natural gradient", "Adam", "SOAP"):
                lr = None
                if method != "natural gradient":
                    tried = {
                        rate: kept(
                            f"{name}/{method}/lr {rate:g}/{seconds / 3:.0f} s",
                            lambda n=name, m=method, r=rate: run(n, m, TUNING_SEED, seconds / 3, r),
                        )
                        for rate in RATES
                    }
                    lr = min(RATES, key=lambda rate: tried[rate]["loss"] if math.isfinite(tried[rate]["loss"]) else math.inf)
                kept(
                    f"{name}/{method}/seed {seed}/{seconds:.0f} s",
                    lambda n=name, m=method, s=seed, r=lr: run(n, m, s, seconds, r),
                )


def shown(known: dict[str, Any], seconds: float, seeds: int) -> str:
    """The table: relative errors, and the natural gradient's over the others'."""
    rows = [["equation", "seed", "natural gradient", "steps", "Adam", "steps", "SOAP", "steps", "of Adam's", "of SOAP's"]]
    for name in PROBLEMS:
        for seed in range(seeds):
            found = [known["runs"].get(f"{name}/{m}/seed {seed}/{seconds:.0f} s") for m in ("natural gradient", "Adam", "SOAP")]
            if found[0] is not None and any(found[1:]):
                cells = [c for r in found for c in ((f"{r['error']:.1e}", str(r["steps"])) if r else ("-", "-"))]
                ours = found[0]["error"]
                rows.append([name, str(seed), *cells, *(f"{ours / r['error']:.5f}" if r else "-" for r in found[1:])])
    return table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="CPU seconds of each run")
    parser.add_argument("--seeds", type=int, default=1, help="networks and points")
    parser.add_argument("--only", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS), help="equations; all by default")
    parser.add_argument("--table", action="store_true", help="show what is there, run nothing")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if not asked.table:
        study(asked.seconds, asked.seeds, asked.only)
    print(shown(read(), asked.seconds, asked.seeds))


if __name__ == "__main__":
    main()
