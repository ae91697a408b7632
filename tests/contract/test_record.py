"""``optimizer.last`` against a dense M = P Pᵀ, column by column, and the parameters before and after."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import precond
from precond import L1, L2, vec

LAM = 0.3


def stepped(name, **options):
    """An optimizer after two steps of a small net in float64, what the last one moved, its parameters and gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    optimizer = precond.RECIPES[name](model, weight_decay=0.0, **options)
    params = tuple(model.parameters())
    for _ in range(2):
        before = [p.detach().clone() for p in params]
        optimizer.zero_grad()
        model(torch.randn(16, 3, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
    moved = vec.flatten([p.detach() - q for p, q in zip(params, before, strict=True)])
    return optimizer, moved, vec.flatten([p.detach() for p in params]), vec.flatten([p.grad for p in params])


def dense_gram(P, like):
    return torch.stack(
        [vec.flatten(P.gram(vec.unflatten(e, like))) for e in torch.eye(sum(t.numel() for t in like)).double()], 1
    )


# Formulas of float64 in other orders; of M⁻¹ (κ up to 1e5 here) the same in about 1e-11.
CLOSE = {"rel": 1e-8}


@pytest.mark.parametrize("name", precond.RECIPES)
def test_the_ratio_of_the_last_update(name):
    optimizer, moved, p, _ = stepped(name)
    close = {"rel": 0.05} if name in ("whitening", "auto") else CLOSE  # whose roots were renewed after the step
    assert optimizer.last.update_ratio == pytest.approx((moved.norm() / p.norm()).item(), **close)


@pytest.mark.parametrize("space", ["p", "z"])
@pytest.mark.parametrize("name", precond.RECIPES)
def test_the_ratio_of_a_clipped_update(name, space):
    optimizer, moved, p, _ = stepped(name, max_norm=1e-3, norm_space=space)
    assert optimizer.last.update_ratio == pytest.approx((moved.norm() / p.norm()).item(), **CLOSE)


@pytest.mark.parametrize("space", ["p", "z"])
@pytest.mark.parametrize("name", precond.RECIPES)
def test_numbers_of_the_last_step(name, space):
    optimizer, _, p, g = stepped(name, regularizers=[L2(LAM, space)])
    M = dense_gram(optimizer.map(), [p for group in optimizer.param_groups for p in group["params"]])
    last = optimizer.last.as_dict()
    assert last["grad_norm"] == pytest.approx(g.norm().item(), **CLOSE)
    assert last["preconditioned_grad_norm"] == pytest.approx((g @ M @ g).sqrt().item(), **CLOSE)
    squared = p @ p if space == "p" else p @ torch.linalg.solve(M, p)
    assert last["penalty"] == pytest.approx(LAM * squared.item(), **CLOSE)


class Mute(L1):
    """A penalty whose value needs what is not there."""

    def value(self, at):
        return at.space.map.to_dense().sum()


def test_a_penalty_that_cannot_be_told_says_why_and_is_no_number_for_a_logger():
    optimizer, *_ = stepped("muon", regularizers=[Mute(LAM, "p")])
    with pytest.raises(ValueError, match="takes vectors of any shape"):
        optimizer.last.penalty  # noqa: B018
    assert math.isnan(optimizer.last.as_dict()["penalty"]) and optimizer.last.as_dict()["grad_norm"] > 0
