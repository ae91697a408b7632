"""Optimizers of others, each with its own defaults but for weight decay, which is none."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from precond.lab.workloads.entrant import Peer
from precond.lab.workloads.evaluation import renewed_statistics
from precond.lab.workloads.learning_rates import Decay
from precond.lab.workloads.problem import Problem


def sgd(model: nn.Module, lr: float) -> Optimizer:
    """Torch's SGD with momentum 0.9."""
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9)


def adamw(model: nn.Module, lr: float, betas: tuple[float, float] = (0.9, 0.999)) -> Optimizer:
    """Torch's AdamW, fused."""
    return torch.optim.AdamW(model.parameters(), lr, betas, weight_decay=0.0, fused=True)


def muon(model: nn.Module, lr: float) -> Optimizer:
    """Torch's Muon for all matrices and kernels, recurrent ones too, but those of embeddings and of a layer named ``head``, AdamW for the rest.

    Kernels of convolutions are orthogonalized as matrices of (outputs, all else), as Muon's author does; one learning rate serves
    both with the factor that gives Muon's step the length of AdamW's.
    """
    # A weight that an embedding shares with the head is found at both, and left out by either.
    left = [
        m
        for name, m in model.named_modules()
        if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) or name.split(".")[-1] == "head"
    ]
    spared = {id(p) for m in left for p in m.parameters(recurse=False)}
    matrices = [p for p in model.parameters() if p.ndim >= 2 and id(p) not in spared]
    taken = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in taken]
    flat = [nn.Parameter(p.data.flatten(1)) for p in matrices]
    made: list[Optimizer] = []
    if flat:
        made.append(torch.optim.Muon(flat, lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    if rest:
        made.append(torch.optim.AdamW(rest, lr, weight_decay=0.0, fused=True))
    return Joined(made, list(zip(matrices, flat, strict=True)))


class Joined(Optimizer):
    """Several optimizers that step as one.

    Args:
        optimizers: each with parameters of its own.
        views: parameters of the model, and what stands for them in an optimizer: a view of the same memory in another shape.
    """

    def __init__(self, optimizers: Sequence[Optimizer], views: Sequence[tuple[Tensor, Tensor]] = ()) -> None:
        # Torch's own constructor would copy the groups, which belong to the optimizers.
        self._optimizers, self._views = tuple(optimizers), tuple(views)
        self.defaults = self._optimizers[0].defaults
        self._share_groups()

    def _share_groups(self) -> None:
        self.param_groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none)
        for p, _ in self._views:
            p.grad = None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else closure()
        for p, view in self._views:
            view.grad = None if p.grad is None else p.grad.reshape(view.shape)
        for optimizer in self._optimizers:
            optimizer.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {str(i): optimizer.state_dict() for i, optimizer in enumerate(self._optimizers)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for i, optimizer in enumerate(self._optimizers):
            optimizer.load_state_dict(state_dict[str(i)])
        self._share_groups()


def pytorch_optimizer(name: str, **options: Any) -> Callable[[nn.Module, float], Optimizer]:
    """An optimizer of the package pytorch-optimizer by its name."""

    def make(model: nn.Module, lr: float) -> Optimizer:
        return getattr(_package("pytorch_optimizer"), name)(model.parameters(), lr=lr, weight_decay=0.0, **options)

    return make


def shampoo(model: nn.Module, lr: float) -> Optimizer:
    """ScalableShampoo of pytorch-optimizer from the first step on, refreshed every 10 steps.

    Its own defaults wait for 25 steps and refresh every 1,000, which is more than these trainings have.
    """
    make = pytorch_optimizer("ScalableShampoo", start_preconditioning_step=1, preconditioning_compute_steps=10)
    return make(model, lr)


def heavyball(name: str) -> Callable[[nn.Module, float], Optimizer]:
    """An optimizer of the package heavyball by its name, not compiled: tuning kernels would take longer than these trainings."""

    def make(model: nn.Module, lr: float) -> Optimizer:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            package = _package("heavyball")
            package.utils.compile_mode = None
            optimizer = getattr(package, name)(model.parameters(), lr=lr, weight_decay=0.0, compile_step=False)
        # It says so at every step of a schedule, and supports it with its own defaults.
        warnings.filterwarnings("ignore", "Learning rate changed between steps")
        return optimizer

    return make


def schedule_free(model: nn.Module, lr: float) -> Optimizer:
    """AdamW of the package schedulefree."""
    optimizer = _package("schedulefree").AdamWScheduleFree(model.parameters(), lr=lr, weight_decay=0.0)
    optimizer.train()
    return optimizer


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}; install what it is compared with: pip install 'precond[bench]'") from error


@dataclass(frozen=True)
class Unsaved(Peer):
    """One whose state dict does not hold what it goes on from."""

    restorable: bool = False


@dataclass(frozen=True)
class ScheduleFree(Peer):
    """A schedule-free optimizer (Defazio et al., 2024): constant learning rate, evaluated at its average."""

    decay: Decay | None = "constant"

    @contextmanager
    def evaluating(self, optimizer: Any, problem: Problem) -> Iterator[None]:
        optimizer.eval()
        try:
            with renewed_statistics(problem):
                yield
        finally:
            optimizer.train()
