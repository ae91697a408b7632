"""Real data and small models in float64, with explicit derivatives to hold :mod:`precond.analysis.curvature` against."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, wraps
from typing import ParamSpec, TypeVar

import torch
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector

from precond.analysis.curvature import Objective, neuron_hessians
from precond.analysis.diagnostics import preconditioner_of
from precond.optim.optimizer import PreconditionedGD
from precond.optim.preconditioners import Preconditioner

Loss = Callable[[Tensor, Tensor], Tensor]
_P = ParamSpec("_P")
_T = TypeVar("_T")

_seed: ContextVar[int] = ContextVar("precond_evidence_seed", default=0)


@contextmanager
def drawn(seed: int) -> Iterator[None]:
    """Measurements inside are those of a seed: other first weights, maps and vectors, and from 1 on other samples of the data, too."""
    token = _seed.set(seed)
    try:
        yield
    finally:
        _seed.reset(token)


def generator(seed: int) -> torch.Generator:
    """Of a measurement's own number, and of the seed that it is measured with."""
    return torch.Generator().manual_seed(seed + 1000 * _seed.get())


def remembered(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Made once for each seed."""
    known: dict[object, _T] = {}

    @wraps(function)
    def recalled(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        key = (_seed.get(), args, tuple(kwargs.items()))
        if key not in known:
            known[key] = function(*args, **kwargs)
        return known[key]

    return recalled


def half_square(out: Tensor, y: Tensor) -> Tensor:
    """½|ŷ − y|², averaged over samples."""
    return 0.5 * (out - y).square().sum(1).mean()


def logistic(out: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of a logit."""
    return nn.functional.binary_cross_entropy_with_logits(out[:, 0], y)


@cache
def _loaded(name: str) -> tuple[Tensor, Tensor]:
    load = {"wine": load_wine, "breast cancer": load_breast_cancer, "digits": load_digits}[name]
    features, classes = load(return_X_y=True)
    return torch.as_tensor(features, dtype=torch.float64), torch.as_tensor(classes)


@remembered
def raw(name: str, constant: bool = False) -> tuple[Tensor, Tensor]:
    """Features (N, n) as they are, constant ones only if wanted, and classes (N,), of "wine", "breast cancer" or "digits".

    Seed 0 has all samples, each other one four fifths of them.
    """
    x, y = _loaded(name)
    if _seed.get():
        some = torch.randperm(len(x), generator=generator(0))[: 4 * len(x) // 5].sort().values
        x, y = x[some], y[some]
    return x if constant else x[:, x.std(0) > 0], y


@remembered
def standardized(name: str) -> tuple[Tensor, Tensor]:
    """(x − μ)/σ with the biased variance, and classes."""
    x, y = raw(name)
    return (x - x.mean(0)) / x.std(0, correction=0), y


def extended(x: Tensor) -> Tensor:
    """X_e, (n + 1, N), of samples as rows."""
    return torch.cat([torch.ones_like(x[:, :1]), x], 1).T


@dataclass(frozen=True, eq=False)
class Problem:
    """L(p) = mean loss + ``penalty``·‖p‖² of a model on one batch.

    The vector p holds the parameters in the order of ``model.parameters()``.
    """

    model: nn.Module
    loss: Loss
    x: Tensor
    y: Tensor
    penalty: float = 0.0

    @property
    def p(self) -> Tensor:
        """A copy of the current parameters."""
        return parameters_to_vector(self.model.parameters()).detach().clone()

    def set(self, p: Tensor) -> None:
        """Make p the current parameters."""
        with torch.no_grad():
            for parameter, piece in zip(self.model.parameters(), self.pieces(p), strict=True):
                parameter.copy_(piece)

    def pieces(self, p: Tensor) -> tuple[Tensor, ...]:
        """p as tensors of the parameters' shapes."""
        shapes = [q.shape for q in self.model.parameters()]
        return tuple(v.reshape(s) for v, s in zip(p.split([s.numel() for s in shapes]), shapes, strict=True))

    def at(self, p: Tensor) -> Tensor:
        """L(p), differentiable in p."""
        names = [name for name, _ in self.model.named_parameters()]
        out = functional_call(self.model, dict(zip(names, self.pieces(p), strict=True)), (self.x,))
        return self.loss(out, self.y) + self.penalty * p.square().sum()

    def gradient(self, p: Tensor) -> Tensor:
        """∇L(p)."""
        q = p.detach().requires_grad_()
        return torch.autograd.grad(self.at(q), q)[0]

    def hessian(self, p: Tensor) -> Tensor:
        """∇²L(p), dense, row by row."""
        return torch.autograd.functional.hessian(self.at, p.detach())

    def objective(self) -> Objective:
        """The same loss as the library sees it."""
        return Objective(self.model, self.loss_with_penalty, [(self.x, self.y)])

    def loss_with_penalty(self, out: Tensor, y: Tensor) -> Tensor:
        """Of outputs, with the penalty on the model's current parameters."""
        return self.loss(out, y) + self.penalty * sum(p.square().sum() for p in self.model.parameters())

    def closure(self) -> Callable[[], Tensor]:
        """For an optimizer's step."""

        def evaluate() -> Tensor:
            self.model.zero_grad()
            loss = self.loss_with_penalty(self.model(self.x), self.y)
            loss.backward()
            return loss

        return evaluate

    def iterates(self, optimizer: torch.optim.Optimizer, steps: int) -> Tensor:
        """The parameters before each of ``steps`` steps and after the last, (steps + 1, n)."""
        closure, found = self.closure(), [self.p]
        for _ in range(steps):
            optimizer.step(closure)  # type: ignore[arg-type] # torch's stubs want a float
            found.append(self.p)
        return torch.stack(found)

    def minimum(self, steps: int = 200) -> Tensor:
        """Newton's method on |H|, its null space left alone, with halved steps where the loss does not fall; sets p*."""
        p = self.p
        for _ in range(steps):
            g = self.gradient(p)
            lam, V = torch.linalg.eigh(self.hessian(p))
            keep = lam.abs() > 1e-9 * lam.abs().max()
            step = V[:, keep] @ (
                (V[:, keep].T @ g) / lam[keep].abs().clamp_min(1e-4 * lam.abs().max() * min(1.0, float(g.norm())))
            )
            scale, before = 1.0, self.at(p)
            while scale > 1e-6 and not self.at(p - scale * step) <= before:
                scale /= 2
            if float(step.norm()) <= 1e-14 * float(p.norm()) or scale <= 1e-6:
                p = p - step if float(g.norm()) < 1e-8 else p
                break
            p = p - scale * step
        self.set(p)
        return p


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A float64 model with weights N(0, 1/fan_in) and biases N(0, 0.01) of a generator of its own."""
    draw = generator(seed)
    # Modules draw their first weights from the global generator.
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        model = make().double()
        for p in model.parameters():
            scale = p[0].numel() ** -0.5 if p.ndim > 1 else 0.1
            p.copy_(torch.randn(p.shape, generator=draw, dtype=torch.float64) * scale)
    return model


def random(*shape: int, seed: int) -> Tensor:
    """Standard normal numbers of a generator of their own."""
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def logistic_regression(name: str = "breast cancer", penalty: float = 0.01, raw_features: bool = False) -> Problem:
    """One class against the rest."""
    x, y = raw(name) if raw_features else standardized(name)
    return Problem(seeded(lambda: nn.Linear(x.shape[1], 1), 0), logistic, x, (y == 0).double(), penalty)


def tanh_network(hidden: int = 6, penalty: float = 0.01, seed: int = 0) -> Problem:
    """n–hidden–3 with tanh and cross-entropy on standardized wine."""
    x, y = standardized("wine")
    model = seeded(lambda: nn.Sequential(nn.Linear(x.shape[1], hidden), nn.Tanh(), nn.Linear(hidden, 3)), seed)
    return Problem(model, nn.functional.cross_entropy, x, y, penalty)


def relative(a: Tensor, b: Tensor) -> float:
    """‖a − b‖/‖b‖."""
    return float((a - b).norm() / b.norm())


def neuron_block(problem: Problem, H: Tensor, layer: str, unit: int) -> Tensor:
    """The rows and columns of [b; w] of a neuron in the whole Hessian."""
    places = dict(zip((n for n, _ in problem.model.named_parameters()), problem.pieces(torch.arange(len(H))), strict=True))
    bias, weight = (places[f"{layer}.{kind}".lstrip(".")][unit].flatten() for kind in ("bias", "weight"))
    at = torch.cat([bias, weight])
    return H[at][:, at]


def map_in_force(problem: Problem, preconditioner: Preconditioner, names: Sequence[str]) -> Tensor:
    """P of some parameters, dense, once a preconditioner has seen all the data; the parameters stay where they are."""
    problem.model.train()
    optimizer = PreconditionedGD(problem.model, 0.0, preconditioner=preconditioner)
    optimizer.step(problem.closure())
    optimizer.close()
    problem.model.eval()
    return preconditioner_of(
        optimizer, Objective(problem.model, problem.loss, [(problem.x, problem.y)], params=names)
    ).to_dense()


def of_first_neuron(P: Tensor, inputs: int) -> Tensor:
    """The rows and columns of [b; w] of the first neuron in a matrix over all of [W, b]."""
    at = torch.tensor([len(P) * inputs // (inputs + 1), *range(inputs)])
    return P[at][:, at]


def neuron_error(problem: Problem, layers: tuple[str, ...]) -> float:
    """The largest error of H_e S H_eᵀ against the Hessian, relative, over all neurons of some layers."""
    H = problem.hessian(problem.p)
    return max(
        relative(neuron.to_dense(), neuron_block(problem, H, layer, neuron.unit))
        for layer in layers
        for neuron in neuron_hessians(problem.objective(), layer)
    )
