"""The rows of gpu.py: entrants, ways to call their step, and a process of its own that times them one after another."""

from __future__ import annotations

import gc
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import precond

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from device.gpt import GPT

Make = Callable[..., Sequence[torch.optim.Optimizer]]
MODES = ("eager", "captured", "compiled")


@dataclass(frozen=True)
class Size:
    """Of the model and its batches; ``warm`` steps come before ``rounds`` timed ones."""

    width: int
    heads: int
    layers: int
    vocabulary: int
    length: int
    batch: int
    warm: int
    rounds: int


SIZES = {"124M": Size(768, 12, 12, 50257, 1024, 8, warm=21, rounds=10), "small": Size(16, 2, 2, 64, 8, 2, warm=3, rounds=2)}


def torch_adamw(model: nn.Module, **options: Any) -> Sequence[torch.optim.Optimizer]:
    return (torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True, **options),)


def torch_muon(model: nn.Module, **options: Any) -> Sequence[torch.optim.Optimizer]:
    """Hidden matrices by Muon, which takes no ``capturable``; embeddings and vectors by AdamW."""
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    chosen = set(hidden)
    rest = [p for p in model.parameters() if p not in chosen]
    return torch.optim.Muon(hidden, lr=1e-3, **options), torch.optim.AdamW(rest, lr=1e-4, fused=True, **options)


def pytorch_optimizer_soap(model: nn.Module, **options: Any) -> Sequence[torch.optim.Optimizer]:
    import pytorch_optimizer

    return (pytorch_optimizer.SOAP(model.parameters(), lr=1e-4, precondition_frequency=10, **options),)


def recipe(make: Callable[..., torch.optim.Optimizer], model: nn.Module, **options: Any) -> Sequence[torch.optim.Optimizer]:
    return (make(model, lr=1e-4, **options),)


ENTRANTS: dict[str, Make] = {
    "torch AdamW, fused": torch_adamw,
    "torch Muon with AdamW": torch_muon,
    **{name: partial(recipe, make) for name, make in precond.RECIPES.items()},
    "soap, rank 16": partial(recipe, partial(precond.soap, rank=16)),
    "adam, inputs=BNP()": partial(recipe, partial(precond.adam, inputs=precond.BNP())),
    "pytorch-optimizer SOAP": pytorch_optimizer_soap,
}


class Training:
    """A model, a batch, and optimizers that step it in one of :data:`MODES`."""

    def __init__(self, name: str, mode: str, size: Size, device: torch.device, backend: str):
        torch.manual_seed(0)
        self.device, self.size = device, size
        self.model = GPT(size.width, size.heads, size.layers, size.vocabulary, size.length).to(device)
        text = torch.randint(size.vocabulary, (size.batch, size.length + 1)).to(device)
        self.x, self.y = text[:, :-1], text[:, 1:]
        self.optimizers = ENTRANTS[name](self.model, **({"capturable": True} if mode == "captured" else {}))
        self._step: Callable[[], Any] = self._eager
        if mode == "compiled":
            compiled = [torch.compile(o.step, backend=backend) for o in self.optimizers]
            self._step = lambda: [step() for step in compiled]
        self.captured = mode == "captured"

    def _eager(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def gradients(self) -> None:
        for p in self.model.parameters():
            if not self.captured:
                p.grad = None
            elif p.grad is not None:  # a graph reads them where they were
                p.grad.zero_()
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = nn.functional.cross_entropy(self.model(self.x).flatten(0, 1), self.y.flatten())
        loss.backward()

    def capture(self) -> None:
        """From now on repeat CUDA graphs of the warm optimizer's steps: one for each program, captured when it is first wanted."""
        if self.device.type != "cuda":
            raise RuntimeError("CUDA graphs need a GPU")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.gradients()
            self._eager()
        torch.cuda.current_stream().wait_stream(stream)
        self._graphs: dict[Any, torch.cuda.CUDAGraph] = {}
        self._step = self._replay

    def _replay(self) -> None:
        program = tuple(getattr(o, "program", None) for o in self.optimizers)
        if program not in self._graphs:
            self._graphs[program] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graphs[program]):
                self._eager()
        self._graphs[program].replay()
        for optimizer in self.optimizers:
            if isinstance(optimizer, precond.PreconditionedGD):
                optimizer.replayed()

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self) -> tuple[float, float]:
        """Milliseconds of a whole step, and of ``step()`` alone."""
        start = self.now()
        self.gradients()
        middle = self.now()
        self._step()
        end = self.now()
        return 1e3 * (end - start), 1e3 * (end - middle)


def _peak(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else None


def measure(name: str, mode: str, size: Size, device: str, backend: str) -> dict[str, Any]:
    """One row: medians and the worst of the rounds, and MiB at the peak of the training."""
    where = torch.device(device)
    if where.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    training = Training(name, mode, size, where, backend)
    for _ in range(size.warm):
        training.timed()
    if training.captured:
        training.capture()
        for _ in range(size.rounds):  # of whole periods, so that none is captured on the clock
            training.timed()
    rounds = [training.timed() for _ in range(size.rounds)]
    whole, alone = zip(*rounds, strict=True)
    finite: Tensor = torch.stack([p.isfinite().all() for p in training.model.parameters()]).all()
    return {
        "ms": statistics.median(whole),
        "step_ms": statistics.median(alone),
        "step_ms_mean": statistics.fmean(alone),
        "step_ms_worst": max(alone),
        "peak_mib": _peak(where),
        "finite": bool(finite),
    }


def serve(pipe: Any, size: Size, device: str, backend: str) -> None:
    """Measure what comes through the pipe; an error is a row like any other."""
    while (task := pipe.recv()) is not None:
        torch.compiler.reset()
        gc.collect()  # hooks tie models and optimizers of the row before into cycles
        try:
            pipe.send(measure(*task, size, device, backend))
        except BaseException as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            message = " ".join(str(error).split())[:300]
            pipe.send({"error": f"{type(error).__name__}: {message} ({Path(where.filename).name}:{where.lineno})"})
