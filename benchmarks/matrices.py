"""Matrix preconditioners against public ones: milliseconds of an optimizer step, means over whole refresh periods.

python benchmarks/matrices.py [--threads 2] [--rounds 20] [--only muon,adamw] [--clock cpu]

Each candidate steps all parameters of a transformer of 10 million; where one takes matrices alone, a fused AdamW has the rest. A peer
that is not installed or fails is listed with its error.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from harness import TRANSFORMER, parameters, state_bytes, table
from torch import nn

import precond

EVERY = 10
Make = Callable[[list[nn.Parameter]], Sequence[torch.optim.Optimizer]]


def _matrices(params: list[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    return [p for p in params if p.ndim > 1], [p for p in params if p.ndim < 2]


def torch_muon(params: list[nn.Parameter]) -> Sequence[torch.optim.Optimizer]:
    matrices, rest = _matrices(params)
    return torch.optim.Muon(matrices, lr=1e-3), torch.optim.AdamW(rest, lr=1e-3, fused=True)


def heavyball_soap(params: list[nn.Parameter]) -> Sequence[torch.optim.Optimizer]:
    import heavyball

    heavyball.utils.compile_mode = None  # it autotunes for minutes, and is not faster for it here

    options = {"precondition_frequency": EVERY, "max_precond_dim": 10000, "merge_dims": False}
    return (heavyball.SOAP(params, lr=1e-3, **options, compile_step=False, use_precond_schedule=False),)


def pytorch_optimizer_soap(params: list[nn.Parameter]) -> Sequence[torch.optim.Optimizer]:
    import pytorch_optimizer

    return (pytorch_optimizer.SOAP(params, lr=1e-3, precondition_frequency=EVERY),)


def pytorch_optimizer_shampoo(params: list[nn.Parameter]) -> Sequence[torch.optim.Optimizer]:
    import pytorch_optimizer

    return (
        pytorch_optimizer.ScalableShampoo(params, lr=1e-3, start_preconditioning_step=1, preconditioning_compute_steps=EVERY),
    )


def layers(params: list[nn.Parameter]) -> nn.ModuleList:
    """The parameters as linear and normalization layers, whose inputs can be observed."""
    found, rest = nn.ModuleList(), iter(params)
    for weight in rest:
        layer = (
            nn.Linear(*reversed(weight.shape), device="meta") if weight.ndim > 1 else nn.LayerNorm(len(weight), device="meta")
        )
        layer.weight, layer.bias = weight, next(rest)
        found.append(layer)
    return found


@dataclass(frozen=True)
class Observing:
    """Makes an optimizer that sees inputs, which come between the steps and off their clock."""

    recipe: Callable[[nn.Module], torch.optim.Optimizer]

    def __call__(self, params: list[nn.Parameter]) -> Sequence[torch.optim.Optimizer]:
        self_made = self.recipe(model := layers(params))
        self_made.model = model
        return (self_made,)


CANDIDATES: dict[str, Make] = {
    "adamw (fused)": lambda p: (torch.optim.AdamW(p, lr=1e-3, fused=True),),
    "torch Muon": torch_muon,
    "muon": lambda p: (precond.muon(p, lr=1e-3),),
    "pytorch-optimizer SOAP": pytorch_optimizer_soap,
    "heavyball SOAP": heavyball_soap,
    "soap": lambda p: (precond.soap(p, lr=1e-3, precondition_frequency=EVERY),),
    "soap, smaller side": lambda p: (precond.soap(p, lr=1e-3, precondition_frequency=EVERY, sides="smaller"),),
    "soap, smaller side, drift 0.3": lambda p: (
        precond.soap(p, lr=1e-3, precondition_frequency=EVERY, sides="smaller", drift=0.3, factor_frequency=5),
    ),
    "soap, rank 16": lambda p: (precond.soap(p, lr=1e-3, precondition_frequency=EVERY, rank=16),),
    "whitening": Observing(lambda m: precond.whitening(m, lr=1e-3)),
    "whitening, rank 32": Observing(lambda m: precond.whitening(m, lr=1e-3, inputs=precond.Whitening(rank=32))),
    "auto": Observing(lambda m: precond.auto(m, lr=1e-3)),
    "pytorch-optimizer ScalableShampoo, blocks of 512": pytorch_optimizer_shampoo,
    "shampoo, blocks of 512": lambda p: (precond.shampoo(p, lr=1e-3, precondition_frequency=EVERY, block_size=512),),
}


class Steps:
    """One candidate with parameters of its own and a few gradients that take turns."""

    def __init__(self, make: Make):
        self.params = parameters(TRANSFORMER)
        generator = torch.Generator().manual_seed(1)
        self.gradients = [[torch.randn(p.shape, generator=generator) * 1e-2 for p in self.params] for _ in range(4)]
        self.optimizers, self.t = make(self.params), 0
        self.inputs = {n: torch.randn(256, n, generator=generator) for n in (384, 1536)}

    def __call__(self, clock: Callable[[], float]) -> float:
        for p, g in zip(self.params, self.gradients[self.t % len(self.gradients)], strict=True):
            p.grad = g.clone()  # some peers write into gradients
        self.t += 1
        for layer in getattr(self.optimizers[0], "model", ()):
            if isinstance(layer, nn.Linear):
                layer(self.inputs[layer.in_features])
        start = clock()
        for optimizer in self.optimizers:
            optimizer.step()
        return clock() - start

    @property
    def state_bytes(self) -> float:
        return sum(map(state_bytes, self.optimizers)) / sum(p.numel() for p in self.params)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2 * EVERY, help="a multiple of the refresh period")
    parser.add_argument("--only", default="", help="candidates whose names hold one of these, commas between")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: of this process; for a busy machine")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    running: dict[str, Steps] = {}
    times: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    for name, make in CANDIDATES.items():
        if any(part.strip() in name.lower() for part in options.only.split(",")):
            try:
                running[name], times[name] = Steps(make), []
                for _ in range(2):
                    running[name](clock)
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {error}"
                del running[name]
    for _ in range(options.rounds):
        for name, step in running.items():
            times[name].append(step(clock))
    rows = [["optimizer", "ms, mean", "ms, median", "state B/param"]]
    for name, step in running.items():
        t = times[name]
        rows.append([name, f"{1e3 * sum(t) / len(t):.1f}", f"{1e3 * sorted(t)[len(t) // 2]:.1f}", f"{step.state_bytes:.1f}"])
    rows += [[name, "failed", error[:80], ""] for name, error in failed.items()]
    print(table(rows))


if __name__ == "__main__":
    main()
