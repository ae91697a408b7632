"""``max_norm`` with a second gradient: as wrappers of torch's optimizers that clip the perturbed gradient before their step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import precond
from precond import SAM, LossClosure

BOUND, RHO = 0.05, 0.1


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def batches():
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(16, 5, generator=draw, dtype=torch.float64) for _ in range(8)]


def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (model(x) - 3 * x.sum(1, keepdim=True)).square().mean()


def by_hand(make) -> list[torch.Tensor]:
    """SAM in p around an optimizer of torch, the gradient at p + δ clipped before the step."""
    model = net()
    optimizer = make(model.parameters())
    params = list(model.parameters())
    for x in batches():
        g = torch.autograd.grad(loss(model, x), params)
        norm = torch.stack([t.norm() for t in g]).norm()
        with torch.no_grad():
            deltas = [RHO * t / norm for t in g]
            for p, d in zip(params, deltas, strict=True):
                p += d
        optimizer.zero_grad()
        loss(model, x).backward()
        assert torch.stack([p.grad.norm() for p in params]).norm() > 2 * BOUND  # it does clip
        with torch.no_grad():
            for p, d in zip(params, deltas, strict=True):
                p -= d
        nn.utils.clip_grad_norm_(params, BOUND)
        optimizer.step()
    return params


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (precond.adam, torch.optim.Adam),
        (precond.adamw, torch.optim.AdamW),
        (precond.rmsprop, torch.optim.RMSprop),
        (precond.sgd, torch.optim.SGD),
    ],
)
def test_sam_in_p_clips_what_a_wrapper_clips(ours, theirs) -> None:
    model = net()
    optimizer = ours(model, lr=0.01, regularizers=[SAM(RHO, space="p")], max_norm=BOUND)
    for x in batches():
        optimizer.step(LossClosure(lambda x=x: loss(model, x)))
    for p, q in zip(model.parameters(), by_hand(lambda params: theirs(params, lr=0.01)), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("space", ["p", "z"])
def test_a_bound_does_not_shorten_the_first_step_of_adam(space: str) -> None:
    # m̂/√v̂ of one gradient has entries of size 1, whatever the gradient's length, when both averages see the same.
    p = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = precond.adam([p], lr=0.01, eps=1e-12, regularizers=[SAM(0.5, space=space)], max_norm=0.1)
    optimizer.step(LossClosure(lambda: 3 * p.square().sum()))
    assert p.item() == pytest.approx(0.99, rel=1e-6)
