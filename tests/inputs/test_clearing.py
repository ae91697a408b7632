"""Gradients cleared between backwards: several losses of one forward, each with a backward of its own, and batches that are given up."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

import precond
from inputs.test_steps import CHOICES, batch, check_same, make, snapshot
from precond import BNP, SAM, LossClosure, PreconditionedGD, Preconditioner

torch.set_num_threads(1)

ROUNDING = {"rtol": 1e-9, "atol": 1e-12}
"""In float64 the sum of gradients and the gradient of the sum differ by some 1e-16, which roots of small statistics may raise by 1e5."""


def plain(choice: Preconditioner, **options) -> tuple[nn.Module, PreconditionedGD]:
    """A net without gradients that are zero but for rounding, as those of attention's keys' biases are, of which RMS would make steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 2)).double()
    return model, PreconditionedGD(model, **{"lr": 0.05, **options}, preconditioner=choice)


def losses(y: Tensor) -> list[Tensor]:
    return [y[..., 0].square().mean(), 3 * y[..., 1].square().mean(), y.sum(-1).cos().mean()]


def summed(model, optimizer, outputs):
    sum(loss for y in outputs for loss in losses(y)).backward()


def one_by_one(clear, into="new"):
    """PCGrad's backwards, without its projection: the combined gradient is the sum."""

    def gradients(model, optimizer, outputs):
        params, total = list(model.parameters()), None
        for of in zip(*map(losses, outputs), strict=True):
            clear(model, optimizer)
            for loss in of:
                loss.backward(retain_graph=True)
            own = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in params]
            total = own if total is None else [a + b for a, b in zip(total, own, strict=True)]
        if into == "new":
            for p, g in zip(params, total, strict=True):
                p.grad = g
        elif into == "in place":
            for p, g in zip(params, total, strict=True):
                p.grad.copy_(g)
        else:
            clear(model, optimizer)
            for p, g in zip(params, total, strict=True):
                p.grad = g

    return gradients


CLEARS = {
    "optimizer": lambda model, optimizer: optimizer.zero_grad(),
    "zeros": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "model": lambda model, optimizer: model.zero_grad(),
}


def close(a: list[Tensor], b: list[Tensor]) -> None:
    for s, t in zip(a, b, strict=True):
        torch.testing.assert_close(s, t, **ROUNDING)


@pytest.mark.parametrize("clear", CLEARS.values(), ids=CLEARS)
@pytest.mark.parametrize("into", ["new", "in place", "cleared"])
@pytest.mark.parametrize("batches", [1, 2], ids=["a batch", "two batches"])
@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_losses_of_one_forward_with_backwards_of_their_own_are_their_sum(choice, batches, into, clear):
    def train(gradients):
        model, optimizer = plain(choice())
        for k in range(3):
            optimizer.zero_grad()
            gradients(model, optimizer, [model(batch(batches * k + i)) for i in range(batches)])
            optimizer.step()
        return snapshot(model, optimizer)

    close(train(one_by_one(clear, into)), train(summed))


def test_the_same_with_the_second_gradients_of_sam():
    def train(gradients):
        model, optimizer = plain(BNP(), regularizers=[SAM(0.05)])
        for k in range(3):
            optimizer.zero_grad()
            gradients(model, optimizer, [model(batch(k))])
            while optimizer.probe():
                gradients(model, optimizer, [model(batch(k))])
            optimizer.step()
        return snapshot(model, optimizer)

    close(train(one_by_one(CLEARS["optimizer"])), train(summed))


@pytest.mark.parametrize("recipe", ["auto", "bnp", "whitening"])
def test_recipes_step_by_the_sum(recipe):
    def train(gradients):
        model, _ = plain(BNP())
        optimizer = precond.RECIPES[recipe](model, lr=0.01)
        for k in range(4):
            optimizer.zero_grad()
            gradients(model, optimizer, [model(batch(k))])
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    close(train(one_by_one(CLEARS["optimizer"])), train(summed))


def test_a_loss_whose_gradient_is_thrown_away_before_that_of_another_through_the_same_forward():
    """An actor's loss, which leaves gradients in the trunk of a critic that are not wanted there."""

    def train(thrown):
        model, optimizer = make(BNP())
        for k in range(3):
            optimizer.zero_grad()
            y = model(batch(k))
            if thrown:
                y.square().sum().backward(retain_graph=True)
                optimizer.zero_grad()
                optimizer.zero_grad()  # twice is once
            y.square().mean().backward()
            optimizer.step()
        return snapshot(model, optimizer)

    check_same(train(True), train(False))


@pytest.mark.parametrize("none", [True, False], ids=["to None", "to zeros"])
@pytest.mark.parametrize("how", ["backward", "closure", "closure that adds"])
@pytest.mark.parametrize("given_up", ["backward", "two backwards", "forward"])
@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_a_batch_that_is_given_up_after_its_backward_leaves_nothing(choice, given_up, how, none):
    def train(k_bad):
        model, optimizer = make(choice())
        for k in range(4):
            optimizer.zero_grad(set_to_none=none)
            if k == k_bad:
                loss = model(9 * batch(9)).square().mean()
                if given_up != "forward":
                    loss.backward(retain_graph=True)
                if given_up == "two backwards":
                    optimizer.zero_grad(set_to_none=none)
                    loss.backward()
                optimizer.zero_grad(set_to_none=none)

            def loss_of(k=k):
                if how == "closure":
                    optimizer.zero_grad(set_to_none=none)
                loss = model(batch(k)).square().mean()
                loss.backward()
                return loss

            if how == "backward":
                loss_of()
                optimizer.step()
            else:
                optimizer.step(loss_of)
        return snapshot(model, optimizer)

    check_same(train(2), train(None))


def test_a_layer_that_the_next_batch_does_not_call_keeps_its_statistics():
    """Two heads: what one saw in a batch that was given up is not folded in by the step of the other."""

    def train(gives_up):
        torch.manual_seed(0)
        heads = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)]).double()
        optimizer = PreconditionedGD(heads, lr=0.1, preconditioner=BNP())
        for k in range(4):
            optimizer.zero_grad()
            if gives_up and k:
                heads[0](9 * batch(9)[:, :, 0]).square().mean().backward()
                optimizer.zero_grad()
            heads[0 if k == 0 else 1](batch(k)[:, :, 0]).square().mean().backward()
            optimizer.step()
        return snapshot(heads, optimizer)

    check_same(train(True), train(False))


def test_a_closure_that_goes_backward_through_a_forward_before_it():
    def train(how):
        model, optimizer = make(BNP())
        for k in range(3):
            optimizer.zero_grad()
            if how == "plain":
                optimizer.step(LossClosure(lambda k=k: model(batch(k)).square().mean()))
                continue
            loss = model(batch(k)).square().mean()
            loss.backward(retain_graph=True)
            optimizer.zero_grad()
            optimizer.step(lambda loss=loss: (loss.backward(), loss)[1])
        return snapshot(model, optimizer)

    check_same(train("before"), train("plain"))


@pytest.mark.parametrize("clear", CLEARS.values(), ids=CLEARS)
@pytest.mark.parametrize("given_up", [False, True], ids=["", "after a batch that is given up"])
@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_all_micro_batches_of_a_closure_count(choice, given_up, clear):
    def train(parts):
        model, optimizer = plain(choice())

        def closure(k):
            clear(model, optimizer)
            for x in batch(k).chunk(parts):
                (model(x).square().mean() / parts).backward()

        for k in range(4):
            if given_up and parts > 1:
                model(9 * batch(9)).square().mean().backward()
            optimizer.step(partial(closure, k))
        return snapshot(model, optimizer)

    close(train(2), train(1))
