"""The optimizer step alone against torch's best variant, and against the bytes that it must move.

python benchmarks/step.py [--threads 2] [--clock cpu] [--small]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from harness import SHAPES, copy_bandwidth, parameters, state_bytes, table, take_turns

import precond

# Passes over the parameters: reads and writes of p, g and state that no implementation can avoid.
PASSES = {"adamw": 7, "sgd": 3, "rmsprop": 5, "adagrad": 5}
# Where Python calls decide, not memory.
SMALL = {"500 × 64": [(64,)] * 500}
MATRICES = {"MLP 784-512-512-10": SHAPES["MLP 784-512-512-10"], "50 × 8×8": [(8, 8)] * 50}


def fastest_torch(name: str, shapes) -> dict[str, torch.optim.Optimizer]:
    """torch's variants of a recipe."""
    cls = {"adamw": "AdamW", "sgd": "SGD", "rmsprop": "RMSprop", "adagrad": "Adagrad"}[name]
    variants: dict[str, dict[str, bool]] = {"fused": {"fused": True}, "foreach": {"foreach": True}, "loop": {"foreach": False}}
    if name == "rmsprop":
        del variants["fused"]
    return {v: getattr(torch.optim, cls)(parameters(shapes), lr=1e-3, **kw) for v, kw in variants.items()}


def torch_muon(shapes) -> Callable[[], None]:
    """torch's Muon on matrices, its fused AdamW on the rest."""
    params = parameters(shapes)
    matrices, rest = [p for p in params if p.ndim > 1], [p for p in params if p.ndim < 2]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.Muon(matrices, lr=1e-3)]
    if rest:
        optimizers.append(torch.optim.AdamW(rest, lr=1e-3, fused=True))
    return lambda: [o.step() for o in optimizers]  # type: ignore[return-value]


def small(clock: Callable[[], float]) -> None:
    """Steps of many small tensors."""
    rows = [["shapes", "recipe", "ms", "torch's best", "ms", "ratio"]]
    for label, shapes in SMALL.items():
        for name in ("adamw", "sgd"):
            ours = precond.RECIPES[name](parameters(shapes), lr=1e-3)
            peers = {v: o.step for v, o in fastest_torch(name, shapes).items()}
            rows.append(_row(label, name, take_turns({"ours": ours.step, **peers}, rounds=200, warm=20, clock=clock)))
    for label, shapes in MATRICES.items():
        ours = precond.muon(parameters(shapes), lr=1e-3)
        steps = {"ours": ours.step, "Muon": torch_muon(shapes)}
        rows.append(_row(label, "muon", take_turns(steps, rounds=40, warm=5, clock=clock)))
    print(table(rows))


def _row(label: str, name: str, times: dict[str, float]) -> list[str]:
    ours = times.pop("ours")
    best = min(times, key=lambda v: times[v])
    return [label, name, f"{1e3 * ours:.3f}", best, f"{1e3 * times[best]:.3f}", f"{ours / times[best]:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: of this process; for a busy machine")
    parser.add_argument("--small", action="store_true", help="many small tensors instead")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    if options.small:
        small(clock)
        return
    rows = [["shapes", "recipe", "ms", "torch's best", "ms", "ratio", "times the floor", "torch's", "state B/param"]]
    for label, shapes in SHAPES.items():
        size = sum(p.numel() for p in parameters(shapes))
        bandwidth = copy_bandwidth(size)
        for name, passes in PASSES.items():
            peers = fastest_torch(name, shapes)
            ours = precond.RECIPES[name](parameters(shapes), lr=1e-3)
            times = take_turns(
                {"ours": ours.step, **{v: o.step for v, o in peers.items()}}, rounds=60 if size > 1e6 else 300, clock=clock
            )
            best = min(peers, key=lambda v: times[v])
            floor = 4 * passes * size / bandwidth
            rows.append(
                [
                    f"{label} ({size / 1e6:.1f} M)",
                    name,
                    f"{1e3 * times['ours']:.3f}",
                    best,
                    f"{1e3 * times[best]:.3f}",
                    f"{times['ours'] / times[best]:.2f}",
                    f"{times['ours'] / floor:.2f}",
                    f"{times[best] / floor:.2f}",
                    f"{state_bytes(ours) / size:.1f}",
                ]
            )
    print(table(rows))


if __name__ == "__main__":
    main()
