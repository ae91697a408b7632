"""Embeddings as layers of one-hot inputs, where a user asks for that."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import precond
from inputs.steps import copies, stepped
from precond import BNP, RMS, PreconditionedGD
from precond.optim.inputs import OneHot

torch.set_num_threads(1)
TOKENS = torch.tensor([[0, 1, 1, 3], [3, 3, 5, 1], [1, 1, 0, 3]])


@pytest.fixture
def onehot():
    handle = precond.register_layer(nn.Embedding, tap=OneHot)
    yield
    handle.remove()


def dense(tokens: Tensor, padding: int | None = None) -> Tensor:
    """One-hot inputs, one a line."""
    H = torch.zeros(tokens.numel(), 6, dtype=torch.float64)
    for row, token in zip(H, tokens.flatten().tolist(), strict=True):
        if token != padding:
            row[token] = 1
    return H


@pytest.mark.parametrize("padding", [None, 3])
def test_a_step_divides_by_the_second_moments_of_one_hot_inputs(onehot, padding):
    """P Pᵀg with M = E[hhᵀ]⁻¹, whole: the pseudo-inverse leaves rows alone that no token stands for, which have no gradient."""
    torch.manual_seed(0)
    table = nn.Embedding(6, 3, padding_idx=padding).double()
    before = copies(table.weight)
    optimizer = stepped(table, lambda: table(TOKENS))
    H = dense(TOKENS, padding)
    M = torch.linalg.pinv(H.T @ H / len(H))
    torch.testing.assert_close(table.weight.detach(), before[0] - 0.1 * M @ table.weight.grad, rtol=1e-12, atol=1e-14)
    state = optimizer.state[table.weight]
    torch.testing.assert_close(state["mean"][0], H.mean(0))
    torch.testing.assert_close(state["variance"][0], H.var(0, correction=0))


def test_running_statistics_are_those_of_one_hot_inputs_to_a_layer(onehot):
    """Damping, activity and running averages as well: equal to a linear layer that is given the one-hot rows."""
    torch.manual_seed(0)
    table, layer = nn.Embedding(6, 3).double(), nn.Linear(6, 3, bias=False).double()
    layer.weight = nn.Parameter(table.weight.detach().T.clone())
    optimizers = [PreconditionedGD(m, lr=0.1, preconditioner=BNP(decay=0.8) @ RMS()) for m in (table, layer)]
    for t in range(6):
        tokens = torch.randint(0, 6, (4 + t,), generator=torch.Generator().manual_seed(t))
        for model, x, optimizer in zip((table, layer), (tokens, dense(tokens)), optimizers, strict=True):
            optimizer.zero_grad()
            (model(x) - 1).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(table.weight.T, layer.weight, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("recipe", ["whitening", "auto", "soap", "adamw"])
def test_other_recipes_do_with_embeddings_what_they_did(onehot, recipe):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 2))
    optimizer = precond.RECIPES[recipe](model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            optimizer.zero_grad()
            model(TOKENS).square().mean().backward()
            optimizer.step()
    row = optimizer.explain().rows[0]
    assert row.name == "0.weight" and "Whitening" not in row.preconditioner and "BNP" not in row.preconditioner


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(6, 4), nn.Linear(4, 6)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(tokens)))


def test_a_table_that_is_a_head_too_is_passed_by(onehot):
    with pytest.warns(UserWarning, match="shares its weight with a layer that has other inputs"):
        optimizer = precond.bnp(Tied())
    assert optimizer.explain().rows[0].preconditioner == "identity"


def test_nobody_asked():
    """Without registration tables are left to what acts on all else, and explain() says so."""
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = precond.adam(model, inputs=BNP())
    first, second, _ = optimizer.explain().rows
    assert first.preconditioner == "RMS()" and "OneHot" in first.why
    assert second.preconditioner == "BNP() ∘ RelativeRMS()" and second.why == ""
