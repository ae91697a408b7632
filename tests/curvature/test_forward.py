"""The first product of a Jacobian, by dual numbers, against rows of the backward pass alone; and models that let no dual numbers through."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from curvature import test_kinds
from curvature.cases import CROSS
from precond.algebra import vec
from precond.analysis.curvature import Objective, fisher, gauss_newton, hessian, jacobian


class Rounded(torch.autograd.Function):
    """Straight through: the identity to the backward pass."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, g):
        return g


class Around(nn.Module):
    """A network with something between its layers."""

    def __init__(self, between):
        super().__init__()
        self.first, self.last, self.between = nn.Linear(4, 5), nn.Linear(5, 3), between

    def forward(self, x):
        return self.last(self.between(self, self.first(x)))


def constant(model, h):
    """A scale that is constant to the backward pass."""
    with torch.no_grad():
        scale = model.first.weight.square().sum() + h.abs().mean()
        with torch.enable_grad():
            more = h * 2
    return torch.tanh(h) * scale + more + model.first.weight.detach().sum() * h


def hooked(model, h):
    h = torch.tanh(h)
    h.register_hook(lambda g: 3 * g)
    return h


def checkpointed(model, h):
    return checkpoint(lambda t: torch.tanh(t) * model.first.weight.sum(), h, use_reentrant=False)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.block = nn.Embedding(7, 4), nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        tokens = (x * 3).long() % 7
        mixed = nn.functional.scaled_dot_product_attention(*[self.embed(tokens)] * 3, is_causal=True)
        return self.head(self.block(mixed).mean(1))


class Embedded(nn.Module):
    """Some tokens of a table."""

    def __init__(self, **options):
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4, **options), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.embed((x * 3).long() % 7).mean(1)))


def masked() -> nn.Module:
    model = test_kinds.mlp()
    model[0].weight.register_hook(lambda g: g * (torch.arange(g.numel()).view_as(g) % 2))
    return model


def convolutions() -> nn.Module:
    layers = [
        nn.Conv1d(4, 4, 3, groups=2, padding="same"),
        nn.ReLU(inplace=True),
        nn.ConvTranspose1d(4, 3, 2, bias=False),
        nn.GELU(),
    ]
    return nn.Sequential(nn.Unflatten(1, (4, 1)), *layers, nn.MaxPool1d(2), nn.Flatten(), nn.LayerNorm(3), nn.Linear(3, 3))


KINDS = {name: make for name, make in test_kinds.MODELS.items() if name not in ("bfloat16", "float16")} | {
    "attention": Attention,
    "convolutions": convolutions,
    "constants": lambda: Around(constant),
    "padding": lambda: Embedded(padding_idx=0),
    "padding from the end": lambda: Embedded(padding_idx=-7),
}
# To the backward pass these are other functions than to the forward one, or have no forward derivative.
BACKWARD_ONLY = {
    "rounded": lambda: Around(lambda model, h: Rounded.apply(h)),
    "a hook on a tensor": lambda: Around(hooked),
    "a hook on a parameter": masked,
    "checkpoints": lambda: Around(checkpointed),
}


def problem(name: str) -> tuple[nn.Module, Objective]:
    torch.manual_seed(0)
    model = (KINDS | BACKWARD_ONLY)[name]().double()
    x = torch.randn(7, 3, 4) if name in test_kinds.RECURRENT else torch.randn(7, 4)
    data = [(x[:4].double(), torch.arange(4) % 3), (x[4:].double(), torch.arange(3))]
    return model.eval(), Objective(model, CROSS, data)


def rows(model: nn.Module, objective: Objective) -> torch.Tensor:
    """J by one backward pass for each output."""
    params = list(objective.params)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = torch.cat([model(x) for x, _ in objective.batches]).flatten()
    passes = [torch.autograd.grad(o, params, retain_graph=True, materialize_grads=True, allow_unused=True) for o in out]
    return torch.stack([vec.flatten(g) for g in passes])


@pytest.mark.parametrize("memory", [2**30, 0])
@pytest.mark.parametrize("name", KINDS | BACKWARD_ONLY)
def test_the_first_product_is_that_of_the_backward_pass(name, memory):
    model, objective = problem(name)
    exact = rows(model, objective)
    v = tuple(torch.randn_like(p) for p in objective.params)
    J = jacobian(objective, memory=memory)
    for _ in range(2):
        torch.testing.assert_close(vec.flatten(J.mv(v)), exact @ vec.flatten(v), rtol=1e-10, atol=1e-12)
    if name != "checkpoints":  # whose graphs are found out when they are gone through backward
        assert J._dual is (name in KINDS)
    u = tuple(torch.randn_like(t) for t in J.images)
    torch.testing.assert_close(vec.flatten(J.rmv(u)), exact.T @ vec.flatten(u), rtol=1e-10, atol=1e-12)
    assert not any(p.grad is not None or hasattr(p, "tangent") for p in model.parameters())


@pytest.mark.parametrize("name", [name for name in KINDS | BACKWARD_ONLY if name != "a hook on a parameter"])
def test_the_first_gauss_newton_product_is_a_later_one(name):
    model, objective = problem(name)
    exact = rows(model, objective)
    v = tuple(torch.randn_like(p) for p in objective.params)
    for make in (gauss_newton, lambda o: fisher(o, "exact")):
        G = make(objective)
        p = torch.cat([model(x) for x, _ in objective.batches]).softmax(1)
        S = torch.block_diag(*(torch.diag(q) - torch.outer(q, q) for q in p)) / len(p)
        expected = exact.T @ (S @ (exact @ vec.flatten(v)))
        for _ in range(2):
            torch.testing.assert_close(vec.flatten(G.mv(v)), expected, rtol=1e-9, atol=1e-12)
        G = make(objective)
        torch.testing.assert_close(G.mm(tuple(t[None] for t in v))[0][0], G.mv(v)[0], rtol=1e-9, atol=1e-12)


def test_graphs_that_grow_beyond_the_memory_are_forwarded_again():
    _, objective = problem("mlp")
    J = jacobian(objective)
    v = tuple(torch.ones_like(p) for p in objective.params)
    J.mv(v)
    first = sum(g.size.bytes for g in J._graphs.values())
    J.mv(v)
    grown = sum(g.size.bytes for g in J._graphs.values())
    assert grown > first
    less = jacobian(objective, memory=(first + grown) / 2)
    for _ in range(3):
        torch.testing.assert_close(less.mv(v), J.mv(v), rtol=1e-10, atol=1e-12)
    less._graph(0)
    assert 0 < sum(g.size.bytes for g in less._graphs.values()) <= (first + grown) / 2


@pytest.mark.parametrize("matrix", [hessian, gauss_newton, fisher, jacobian])
def test_gradients_scaled_by_frequency_are_those_of_the_loss(matrix):
    """torch scales them on their way back, and the second time it does not: no matrix had such products."""
    ends = []
    for scaled in (False, True):
        _, objective = problem("padding")
        objective.model.embed.scale_grad_by_freq = scaled
        ends.append(matrix(objective).to_dense())
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-14)


def test_rows_of_a_table_beyond_their_norm_are_measured_where_they_would_be_and_left_where_they_are():
    _, objective = problem("padding")
    table = objective.model.embed
    table.max_norm, before = 0.5, table.weight.detach().clone()
    H = hessian(objective).to_dense()
    assert torch.equal(table.weight, before)
    table.weight.data.copy_(before.renorm(2, 0, 0.5))
    table.max_norm = None
    torch.testing.assert_close(H, hessian(objective).to_dense(), rtol=1e-10, atol=1e-12)
