"""Recurrent layers: Theorem 3 over time, and BNP and whitening for W_x and W_h."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import hessian, jacrev, vmap

from precond.analysis.curvature import condition_number
from precond.lab.evidence.problems import Problem, generator, map_in_force, of_first_neuron, raw, relative, remembered, seeded
from precond.lab.evidence.statement import Bars, Chapter, Finding
from precond.optim.preconditioners import BNP, Preconditioner, Whitening

CHAPTER = Chapter("Recurrent layers")

_ON = "RNN, LSTM and GRU 6–5, the rows of 100 digits as sequences of 8"
_WHERE = "beyond the paper"
_INPUTS, _HIDDEN, _TIMES, _SAMPLES = 6, 5, 8, 100
_Kind = Callable[..., nn.RNNBase]
KINDS: dict[str, _Kind] = {"RNN": nn.RNN, "LSTM": nn.LSTM, "GRU": nn.GRU}
_UNIT = {"RNN": 2, "LSTM": 7, "GRU": 12}
"""Of each a row of its weights: of an LSTM one of the forget gate, of a GRU one of the new gate."""


class LastOutput(nn.Module):
    """A recurrent layer and a linear layer that reads its last hidden state."""

    def __init__(self, kind: _Kind):
        super().__init__()
        self.rnn: Any = kind(_INPUTS, _HIDDEN, batch_first=True)
        self.out = nn.Linear(_HIDDEN, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0][:, -1])


@remembered
def _problem(kind: str) -> Problem:
    pixels, y = raw("digits", constant=True)
    some = torch.randperm(len(pixels), generator=generator(1))[:_SAMPLES]
    x = pixels[some].reshape(-1, 8, 8)[:, :, 1:7] / 16  # the outermost columns are almost always empty
    return Problem(seeded(lambda: LastOutput(KINDS[kind]), 0), nn.functional.cross_entropy, x, y[some])


def _explicit(kind: str, rnn: Any, x: Tensor, delta: Tensor, row: int, recurrent: bool) -> Tensor:
    """All hidden states of one sequence x (T, n), (T, hidden): with δ_t added to what a row of W_x, or of W_h, puts out at time t."""
    W, U, b, c = (p.detach() for p in (rnn.weight_ih_l0, rnn.weight_hh_l0, rnn.bias_ih_l0, rnn.bias_hh_l0))
    h = s = x.new_zeros(_HIDDEN)
    states, unit = [], nn.functional.one_hot(torch.tensor(row), len(W)).to(x)
    for t, d in zip(x, delta, strict=True):
        a, u = W @ t + b + (0 if recurrent else d * unit), U @ h + c + (d * unit if recurrent else 0)
        match kind:
            case "RNN":
                h = torch.tanh(a + u)
            case "LSTM":
                i, f, g, o = (a + u).chunk(4)
                s = f.sigmoid() * s + i.sigmoid() * g.tanh()
                h = o.sigmoid() * s.tanh()
            case "GRU":
                (ar, az, an), (ur, uz, un) = a.chunk(3), u.chunk(3)
                z = (az + uz).sigmoid()
                h = (1 - z) * torch.tanh(an + (ar + ur).sigmoid() * un) + z * h
        states.append(h)
    return torch.stack(states)


def _row(problem: Problem, kind: str, recurrent: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(∇² of a row [b; w] by automatic differentiation, H_e S H_eᵀ, E): over samples and times, S with a T×T block for each sample."""
    row, model = _UNIT[kind], problem.model
    assert isinstance(model, LastOutput)
    rnn, out, end = model.rnn, model.out, "hh" if recurrent else "ih"
    weight, bias = getattr(rnn, f"weight_{end}_l0"), getattr(rnn, f"bias_{end}_l0")
    start = torch.cat([bias[row : row + 1], weight[row]]).detach()
    names = (f"rnn.weight_{end}_l0", f"rnn.bias_{end}_l0")
    n = len(weight)

    def loss(v: Tensor) -> Tensor:
        at = nn.functional.one_hot(torch.tensor(row), n).to(v)
        changed = {
            names[0]: weight.detach() + at[:, None] * (v[1:] - start[1:]),
            names[1]: bias.detach() + at * (v[0] - start[0]),
        }
        return problem.loss(torch.func.functional_call(model, changed, (problem.x,)), problem.y)

    exact = torch.autograd.functional.hessian(loss, start)

    def one(delta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        h = _explicit(kind, rnn, x, delta, row, recurrent)[-1]
        return nn.functional.cross_entropy((out.weight.detach() @ h + out.bias.detach())[None], y[None]) / len(problem.x)

    zero = torch.zeros(_SAMPLES, _TIMES, dtype=problem.x.dtype)
    S = vmap(hessian(one))(zero, problem.x, problem.y)
    e = vmap(jacrev(one))(zero, problem.x, problem.y)
    states = vmap(lambda x, d: _explicit(kind, rnn, x, d, row, recurrent))(problem.x, zero)
    before = torch.cat([torch.zeros_like(states[:, :1]), states[:, :-1]], 1)
    inputs = before if recurrent else problem.x
    H = torch.cat([torch.ones_like(inputs[..., :1]), inputs], 2)  # (N, T, n + 1)
    form = torch.einsum("jtp,jts,jsq->pq", H, S, H)
    E = torch.zeros_like(form)
    if recurrent:  # h_{t−1} depends on the row through what it put out before
        J = vmap(jacrev(lambda d, x: _explicit(kind, rnn, x, d, row, recurrent)))(zero, problem.x)  # ∂h_t/∂δ_s
        J = torch.cat([torch.zeros_like(J[:, :1]), J[:, :-1]], 1)
        E[1:] = torch.einsum("jt,jtps,jsq->pq", e, J, H)
    return exact, form, E


@CHAPTER.statement(
    "recurrent-x",
    "Theorem 3",
    "For a row of W_x with its bias, in every gate, the Hessian is X_e S X_eᵀ with the inputs of all times as columns and a T×T block of S for "
    "each sample: what the row changes in later hidden states is in S.",
)
def _of_inputs() -> Finding:
    worst = 0.0
    for kind in KINDS:
        exact, form, _ = _row(_problem(kind), kind, False)
        worst = max(worst, relative(form, exact))
    return Finding("largest error of 3, relative", 0.0, worst, 1e-10, on=_ON)


@CHAPTER.statement(
    "recurrent-h",
    "Theorem 3",
    "For a row of W_h it is H_e S H_eᵀ + E + Eᵀ, E = Σ_j Σ_{s<t} ∂L/∂a_jt (∂ĥ_jt/∂a_js) ĥ_jsᵀ.",
    "Printed for inputs that do not depend on the weights they meet. Hidden states do, by their earlier times; E vanishes where the loss is "
    "flat in what the row puts out.",
)
def _of_states() -> Finding:
    worst, without = 0.0, 0.0
    for kind in KINDS:
        exact, form, E = _row(_problem(kind), kind, True)
        worst, without = max(worst, relative(form + E + E.T, exact)), max(without, relative(form, exact))
    return Finding("largest error of 3, relative (printed: without E)", 0.0, worst, 1e-10, printed=without, on=_ON)


def _observed(kind: str, preconditioner: Preconditioner, end: str) -> Tensor:
    """P of the library in W_x ("ih") or W_h ("hh"), of one row [b; w]."""
    problem = _problem(kind)
    names = [f"rnn.{kind}_{end}_l0" for kind in ("weight", "bias")]
    return of_first_neuron(map_in_force(problem, preconditioner, names), problem.model.get_parameter(names[0]).shape[1])


def _inputs(kind: str, end: str) -> Tensor:
    """What rows of W_x or W_h meet, over samples and times: (N·T, n)."""
    problem = _problem(kind)
    if end == "ih":
        return problem.x.flatten(0, 1)
    rnn = problem.model.rnn
    zero = problem.x.new_zeros(_TIMES)
    states = torch.stack([_explicit(kind, rnn, x, zero, 0, True) for x in problem.x])
    return torch.cat([torch.zeros_like(states[:, :1]), states[:, :-1]], 1).flatten(0, 1)


def _extended(h: Tensor) -> Tensor:
    return torch.cat([torch.ones_like(h[:, :1]), h], 1).T


def _largest(measure: Callable[[str, str], float]) -> float:
    return max(measure(kind, end) for kind in KINDS for end in ("ih", "hh"))


@CHAPTER.statement(
    "recurrent-bnp", "(25)", "BNP's P for W_x and W_h is that of (25), with means and variances over samples and times."
)
def _bnp() -> Finding:
    def error(kind: str, end: str) -> float:
        h = _inputs(kind, end)
        P = torch.diag(1 / torch.cat([torch.ones(1, dtype=h.dtype), h.std(0, correction=0)]))
        P[0, 1:] = -h.mean(0) / h.std(0, correction=0)
        return relative(_observed(kind, BNP(decay=0.0, damping=0.0), end), P)

    return Finding("largest error of P, 3 layers, both weights, relative", 0.0, _largest(error), 1e-10, on=_ON)


@CHAPTER.statement(
    "recurrent-whitening", _WHERE, "Whitening's M for W_x and W_h is the inverse of the mean of ĥĥᵀ over samples and times."
)
def _whitening() -> Finding:
    def error(kind: str, end: str) -> float:
        H = _extended(_inputs(kind, end))
        P = _observed(kind, Whitening(decay=0.0, damping=0.0, shrinkage=0.0), end)
        return relative(P @ P.T, torch.linalg.inv(H @ H.T / H.shape[1]))

    return Finding("largest error of M, 3 layers, both weights, relative", 0.0, _largest(error), 1e-8, on=_ON)


def _gauss_newton(kind: str) -> Tensor:
    """JᵀH_LJ/N of a row of W_x: what of the Hessian is definite."""
    problem, row = _problem(kind), _UNIT[kind]
    model = problem.model
    assert isinstance(model, LastOutput)
    zero = problem.x.new_zeros(_SAMPLES, _TIMES)

    def outputs(delta: Tensor, x: Tensor) -> Tensor:
        return model.out.weight.detach() @ _explicit(kind, model.rnn, x, delta, row, False)[-1] + model.out.bias.detach()

    J = vmap(jacrev(outputs))(zero, problem.x) @ torch.cat([torch.ones_like(problem.x[..., :1]), problem.x], 2)
    p = vmap(outputs)(zero, problem.x).softmax(1)
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    return torch.einsum("jcp,jcd,jdq->pq", J, curvature, J) / _SAMPLES


@CHAPTER.statement(
    "recurrent-kappa", "after (26)", "BNP improves κ of the Gauss–Newton matrix of W_x, whitening improves it, too."
)
def _improves() -> Finding:
    worst, bars = 0.0, []
    for kind in KINDS:
        A = _gauss_newton(kind)
        maps = {"": torch.eye(len(A), dtype=A.dtype)}
        for name, preconditioner in (
            ("BNP", BNP(decay=0.0, damping=0.0)),
            ("whitening", Whitening(decay=0.0, damping=0.0, shrinkage=0.0)),
        ):
            maps[name] = _observed(kind, preconditioner, "ih")
        kappas = {name: condition_number(P.T @ A @ P).kappa for name, P in maps.items()}
        bars += [(f"{kind} {name}".strip(), kappa) for name, kappa in kappas.items()]
        worst = max(worst, kappas["BNP"] / kappas[""], kappas["whitening"] / kappas[""])
    return Finding("largest κ(PᵀGP)/κ(G) of 3 layers and both", 1.0, worst, 0.0, "≤", on=_ON, figure=Bars("κ", tuple(bars)))
