"""Mistakes in training loops: told where they are made, before a step is taken of the wrong gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import precond
from contract.table import flat
from precond import SAM, GradientNorm


def problem(regularizer=None, dropout=0.0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(dropout), nn.ReLU(), nn.Linear(8, 2))
    optimizer = precond.sgd(model, lr=0.1, regularizers=[regularizer or SAM(0.05)])
    batches = [(torch.randn(6, 4), torch.randn(6, 2)) for _ in range(3)]
    return model, optimizer, [lambda b=b: F.mse_loss(model(b[0]), b[1]) for b in batches]


def test_a_loop_of_probes_in_each_micro_batch():
    _, optimizer, (A, B, _) = problem()
    A().backward()
    while optimizer.probe():
        A().backward()
    assert not optimizer.probe()  # asked again, nothing having changed
    B().backward()
    with pytest.raises(RuntimeError, match=r"completed already.*From gradient accumulation"):
        optimizer.probe()


def test_gradients_are_clipped_in_place_between_the_loop_and_the_step():
    model, optimizer, (A, *_) = problem()
    A().backward()
    while optimizer.probe():
        A().backward()
    before = flat(model)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()
    assert (flat(model) - before).norm().item() == pytest.approx(0.1 * 1e-3, rel=1e-2)  # float32 of parameters near 0.5


@pytest.mark.parametrize("regularizer", [SAM(0.05), GradientNorm(0.05, method="central")], ids=["SAM", "two points"])
def test_no_backward_at_the_probed_point(regularizer):
    model, optimizer, (A, *_) = problem(regularizer)
    before = flat(model)
    A().backward()
    assert optimizer.probe()
    A()
    with pytest.raises(RuntimeError, match=r"no parameter has a gradient at the probed point: call backward\(\)"):
        optimizer.probe()
    assert torch.equal(flat(model), before) and not optimizer.probing


def test_some_parameters_without_a_gradient_are_legal():
    model, optimizer, (A, *_) = problem()
    A().backward()
    while optimizer.probe():
        A().backward()
        model[0].bias.grad = None
    optimizer.step()
    assert not optimizer.last.skipped


@pytest.mark.parametrize("clear", [lambda o, m: o.zero_grad(), lambda o, m: o.zero_grad(False), lambda o, m: m.zero_grad()])
def test_gradients_cleared_before_the_step(clear):
    model, optimizer, (A, *_) = problem()
    before = flat(model)
    A().backward()
    while optimizer.probe():
        A().backward()
    clear(optimizer, model)
    with pytest.raises(RuntimeError, match=r"zero_grad\(\) was called between"):
        optimizer.step()
    assert torch.equal(flat(model), before)


def test_a_closure_without_gradients_at_the_second_call():
    model, optimizer, (A, *_) = problem()
    before, calls = flat(model), []

    def closure():
        optimizer.zero_grad()
        calls.append(A())
        if len(calls) == 1:
            calls[0].backward()
        return calls[-1]

    with pytest.raises(RuntimeError, match="no parameter has a gradient at the probed point"):
        optimizer.step(closure)
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize("clears", [True, False])
def test_the_batch_after_an_exception_in_the_loop(clears):
    model, optimizer, (A, B, _) = problem(dropout=0.5)
    before = flat(model)
    A().backward()
    with pytest.raises(ZeroDivisionError):
        while optimizer.probe():
            A()
            raise ZeroDivisionError
    if clears:
        optimizer.zero_grad()
    B().backward()
    with pytest.raises(RuntimeError, match=r"called 2 times at the probed point, and 1 times.*restore\(\)"):
        optimizer.probe()
    assert torch.equal(flat(model), before) and not optimizer.probing


def test_restored_after_an_exception_the_next_batch_is_its_own():
    def train(fails):
        model, optimizer, (A, B, _) = problem()
        if fails:
            A().backward()
            with pytest.raises(ZeroDivisionError):
                while optimizer.probe():
                    raise ZeroDivisionError
            optimizer.restore()
        optimizer.zero_grad()
        B().backward()
        while optimizer.probe():
            B().backward()
        optimizer.step()
        return flat(model)

    assert torch.equal(train(True), train(False))


def test_passes_of_as_many_micro_batches_and_looks_at_the_model():
    _, optimizer, losses = problem()
    for _ in range(2):
        optimizer.zero_grad()
        for loss in losses:
            loss().backward()
        while optimizer.probe():
            optimizer.zero_grad()
            for loss in losses:
                loss().backward()
            with torch.no_grad():
                losses[0]()
        optimizer.step()
        assert optimizer.last.gradients == 2


def test_a_diagonal_map_of_other_shapes_is_refused_at_once() -> None:
    p = torch.nn.Parameter(torch.zeros(3))
    P = precond.Fixed(precond.Diagonal((torch.ones(2),)))
    with pytest.raises(ValueError, match=r"Fixed: map has tensors of shapes \[\(2,\)\]; the parameters have \[\(3,\)\]"):
        precond.PreconditionedGD([p], lr=1.0, preconditioner=P)
