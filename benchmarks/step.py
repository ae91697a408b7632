"""The optimizer step alone against torch's best variant, and against the bytes that it must move.

python benchmarks/step.py
"""

from __future__ import annotations

import torch
from harness import SHAPES, copy_bandwidth, parameters, state_bytes, table, take_turns

import precond

# Passes over the parameters: reads and writes of p, g and state that no implementation can avoid.
PASSES = {"adamw": 7, "sgd": 3, "rmsprop": 5, "adagrad": 5}


def fastest_torch(name: str, shapes) -> dict[str, torch.optim.Optimizer]:
    """torch's variants of a recipe."""
    cls = {"adamw": "AdamW", "sgd": "SGD", "rmsprop": "RMSprop", "adagrad": "Adagrad"}[name]
    variants: dict[str, dict[str, bool]] = {"fused": {"fused": True}, "foreach": {"foreach": True}, "loop": {"foreach": False}}
    if name == "rmsprop":
        del variants["fused"]
    return {v: getattr(torch.optim, cls)(parameters(shapes), lr=1e-3, **kw) for v, kw in variants.items()}


def main() -> None:
    torch.set_num_threads(2)
    rows = [["shapes", "recipe", "ms", "torch's best", "ms", "ratio", "times the floor", "torch's", "state B/param"]]
    for label, shapes in SHAPES.items():
        size = sum(p.numel() for p in parameters(shapes))
        bandwidth = copy_bandwidth(size)
        for name, passes in PASSES.items():
            peers = fastest_torch(name, shapes)
            ours = precond.RECIPES[name](parameters(shapes), lr=1e-3)
            times = take_turns({"ours": ours.step, **{v: o.step for v, o in peers.items()}}, rounds=60 if size > 1e6 else 300)
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
