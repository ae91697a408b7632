"""Kinds of layers: users add theirs; whitening acts on all of them; embeddings when asked for; GPT-2's layer is a linear one."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

import precond
from inputs import kinds
from inputs.kinds import KINDS, Case, Conv1D
from inputs.layers import data
from inputs.steps import check_step, copies, stepped
from precond import BNP, Observed, PreconditionedGD, Whitening, routed
from precond.optim.inputs import OneHot
from precond.optim.inputs.watching import unwatched

torch.set_num_threads(1)

# --- whitening -----------------------------------------------------------------------------------------------------------------

EXACT = Whitening(decay=0.0, damping=0.0, shrinkage=0.0, every=1, rank=None)


@pytest.mark.parametrize("case", [c for c in KINDS if "nothing" not in c.name and "one row" not in c.name], ids=repr)
def test_whitening_divides_by_the_inputs_second_moments(case: Case):
    """Undamped, a step is E[ĥĥᵀ]⁻¹ on each row [b; w]."""
    module = case.build()
    optimizer = PreconditionedGD(module, lr=0.0, preconditioner=EXACT)
    for lr in (0.0, 0.1):  # the root is taken after a step
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = lr
        before = {p: p.detach().clone() for p in module.parameters()}
        out = case.call(module)
        (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=out.dtype)).sum().backward()
        with unwatched():
            rows = case.rows(module)
        optimizer.step()
    for part in rows:
        if not part.weight.requires_grad:
            continue
        h, centered = part.samples.detach().double(), part.bias is not None and part.bias.requires_grad
        g = part.weight.grad.reshape(-1)[part.index]
        mean = h.mean(0) if centered else torch.zeros(h.shape[1], dtype=h.dtype)
        C = (h - mean).T @ (h - mean) / len(h)
        if centered:
            g_b = part.bias.grad.reshape(-1)[part.bias_index]
            g = g - g_b[:, None] * mean
        step = g @ torch.linalg.pinv(C, hermitian=True)  # an input that was always zero has no gradient
        moved = before[part.weight] - part.weight.detach()
        torch.testing.assert_close(moved.reshape(-1)[part.index], 0.1 * step, rtol=1e-7, atol=1e-9)
        if centered:
            moved = (before[part.bias] - part.bias.detach()).reshape(-1)[part.bias_index]
            torch.testing.assert_close(moved, 0.1 * (g_b - step @ mean), rtol=1e-7, atol=1e-9)


# --- weights (in, out) -----------------------------------------------------------------------------------------------------------


class Pair(nn.Module):
    """Two layers, wide and tall, of either kind."""

    def __init__(self, turned: bool):
        super().__init__()
        make = (lambda n, m: Conv1D(m, n)) if turned else nn.Linear
        self.a, self.b, self.c = make(4, 7), make(7, 7), make(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


RECIPES = {
    "bnp": lambda m: precond.bnp(m, lr=0.05, weight_decay=0.1),
    "whitening": lambda m: precond.whitening(m, lr=0.01),
    "whitening of a rank": lambda m: precond.whitening(m, lr=0.01, inputs=Whitening(rank=1)),
    "adam, bnp": lambda m: precond.adam(m, lr=0.01, inputs=BNP()),
    "auto": lambda m: precond.auto(m, lr=0.01),
    "auto, standardized": lambda m: precond.auto(m, lr=0.01, choice=precond.Auto(max_inputs=5)),
    "polar": lambda m: PreconditionedGD(m, lr=0.01, preconditioner=precond.Polar(), momentum=precond.Momentum(0.9)),
    "SAM": lambda m: precond.whitening(m, lr=0.01, regularizers=[precond.SAM(0.01)]),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_layer_with_the_inputs_first_is_stepped_as_a_linear_one(recipe):
    """Step by step, in float64: what differs is the order in which sums are taken."""
    torch.manual_seed(0)
    models = [Pair(turned).double() for turned in (False, True)]
    turned = {name: p.detach().T if p.ndim == 2 else p.detach() for name, p in models[0].named_parameters()}
    models[1].load_state_dict(turned)
    optimizers = [RECIPES[recipe](m) for m in models]
    for t in range(12):
        x = data(20, 4, seed=t)
        for model, optimizer in zip(models, optimizers, strict=True):

            def closure(model=model, optimizer=optimizer, x=x):
                optimizer.zero_grad()
                loss = (model(x) - x[:, :2].sin()).square().mean()
                loss.backward()
                return loss

            optimizer.step(closure)
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(
            q.detach().T if q.ndim == 2 else q, p, rtol=1e-6, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}"
        )
    acting = [[(row.preconditioner, row.why) for row in optimizer.explain().rows] for optimizer in optimizers]
    assert acting[0] == acting[1]


# --- what users register ----------------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """A kind that nobody knows: x times a weight (in, out) of another name, x scaled before."""

    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor, scale: float) -> Tensor:
        return (scale * x) @ self.W


class Doubling(nn.Linear):
    """A linear layer that changes its input before its weight does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x)


@pytest.fixture
def register():
    handles = []
    yield lambda *args, **options: handles.append(precond.register_layer(*args, **options))
    for handle in handles:
        handle.remove()


X = data(12, 4)
INPUTS = lambda layer, x, scale: scale * x  # noqa: E731


@pytest.mark.parametrize(
    "kind",
    [Scaled, "Scaled", f"{__name__}.Scaled", lambda module: hasattr(module, "W")],
    ids=["class", "name", "whole name", "predicate"],
)
def test_a_registered_kind_is_observed(kind, register):
    register(kind, Observed("W", None, "io", INPUTS))
    torch.manual_seed(0)
    layer = Scaled().double()
    before = copies(layer.W)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stepped(layer, lambda: layer(X, 3.0))
    expected = layer.W.grad / (3 * X).square().mean(0)[:, None]
    torch.testing.assert_close(layer.W.detach(), before[0] - 0.1 * expected, rtol=1e-9, atol=1e-10)


def test_an_unknown_kind_is_named_and_a_removed_one_is_unknown():
    handle = precond.register_layer(Scaled, Observed("W", None, "io", INPUTS))
    handle.remove()
    handle.remove()
    with pytest.warns(UserWarning, match="'W' is in a Scaled, a kind of layer that is not known .*register_layer"):
        optimizer = precond.whitening(Scaled())
    (row,) = optimizer.explain().rows
    assert row.preconditioner == "RMS()" and row.why.startswith("inputs are not observed: is in a Scaled")


def test_the_last_registered_goes_first(register):
    register(Doubling, Observed(inputs=lambda layer, x: 2 * x))
    torch.manual_seed(0)
    layer = Doubling(4, 3).double()
    before = copies(layer.weight, layer.bias)
    stepped(layer, lambda: layer(X))
    check_step([layer.weight, layer.bias], 2 * X, before)


def test_without_inputs_the_one_argument_that_fits_is_taken(register):
    register(Scaled, Observed("W", None, "io"))
    torch.manual_seed(0)
    layer = Scaled().double()
    optimizer = stepped(layer, lambda: layer(X, 1.0))
    torch.testing.assert_close(optimizer.state[layer.W]["mean"][0], X.mean(0))


@pytest.mark.parametrize(
    ("inputs", "why"),
    [
        (lambda layer, x, scale: 1 / 0, r"could not be told its inputs \(ZeroDivisionError"),
        (lambda layer, x: x, r"could not be told its inputs \(TypeError"),
        (lambda layer, x, scale: x[:, :2], r"has 4 inputs, of which `inputs` of its kind made a tensor of shape \(12, 2\)"),
        (lambda layer, x, scale: x.to_sparse(), "was given a sparse tensor"),
    ],
)
def test_mistakes_of_a_kind_are_said_at_the_step(inputs, why, register):
    register(Scaled, Observed("W", None, "io", inputs))
    layer = Scaled().double()
    optimizer = precond.bnp(layer)
    layer(X, 1.0).sum().backward()
    with pytest.warns(UserWarning, match=f"'W' .*{why}"):
        optimizer.step()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: precond.register_layer(3), TypeError, "class of modules, its name or a predicate, got 3"),
        (lambda: precond.register_layer(Scaled, "W"), TypeError, r"precond.Observed\(...\), got 'W'"),
        (lambda: precond.register_layer(Scaled, Observed(), tap=OneHot), ValueError, "in place of"),
        (lambda: Observed(axes="io e"), ValueError, "axes"),
        (lambda: routed(X), ValueError, "counts, or offsets, or index"),
        (lambda: routed(X, index=torch.zeros(12)), ValueError, "counts, or offsets, or index"),
    ],
)
def test_bad_registrations(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_rows_that_are_routed():
    x = torch.arange(5.0)[:, None]
    cases = [
        (routed(x, counts=torch.tensor([2, 0, 2])), [[0, 1], [], [2, 3]]),  # the last row is nobody's
        (routed(x, offsets=torch.tensor([2, 2, 5])), [[0, 1], [], [2, 3, 4]]),
        (routed(x, index=torch.tensor([1, 0, 3, -1, 1]), experts=3), [[1], [0, 4], []]),
        (routed(x[:2], index=torch.tensor([[2, 0], [0, 1]]), experts=3), [[0, 1], [1], [0]]),
    ]
    for found, expected in cases:
        assert [part.flatten().tolist() for part in found] == expected


def test_registered_weights_of_one_layer_may_see_different_inputs(register):
    """Experts with a gate: the second weight sees what the first ones make."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1, self.w2 = nn.Parameter(torch.randn(2, 5, 4)), nn.Parameter(torch.randn(2, 3, 5))

        def forward(self, x, offsets):
            hidden = [torch.tanh(rows @ W.T) for rows, W in zip(routed(x, offsets=offsets), self.w1, strict=True)]
            return torch.cat([h @ W.T for h, W in zip(hidden, self.w2, strict=True)])

    first = lambda layer, x, offsets: routed(x, offsets=offsets)  # noqa: E731
    second = lambda layer, *call: [torch.tanh(h @ W.T) for h, W in zip(first(layer, *call), layer.w1, strict=True)]  # noqa: E731
    register(Gated, Observed("w1", None, "eoi", first), Observed("w2", None, "eoi", second))
    torch.manual_seed(0)
    layer, offsets = Gated().double(), torch.tensor([5, 12])
    before = copies(layer.w2)
    hidden = [h.detach() for h in second(layer, X, offsets)]
    stepped(layer, lambda: layer(X, offsets))
    for e, h in enumerate(hidden):
        expected = before[0][e] - 0.1 * layer.w2.grad[e] / h.square().mean(0)
        torch.testing.assert_close(layer.w2[e].detach(), expected, rtol=1e-9, atol=1e-10)


def test_experts_without_rows_in_a_step_keep_their_statistics():
    torch.manual_seed(0)
    layer = kinds.Experts(False, True).double()
    optimizer = PreconditionedGD(layer, lr=0.1, preconditioner=BNP())
    for counts in ([6, 6, 0], [0, 5, 7]):
        before = copy.deepcopy(optimizer.state[layer.W])
        optimizer.zero_grad()
        layer(X, torch.tensor(counts)).square().mean().backward()
        optimizer.step()
    state = optimizer.state[layer.W]
    assert state["count"].tolist() == [6, 11, 7]
    for name in ("mean", "variance", "activity"):
        torch.testing.assert_close(state[name][0], before[name][0], rtol=1e-14, atol=0)
        assert state[name].isfinite().all()
    assert all(p.isfinite().all() for p in layer.parameters())


def test_running_a_recurrent_module_once_more_changes_nothing_of_it():
    """Outputs, dropout's random numbers and those that come after are as without an observer."""

    def outputs(observed: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.LSTM(3, 4, 3, dropout=0.5, bidirectional=True).double()
        optimizer = precond.whitening(model) if observed else None
        out = [model(data(5, 2, 3))[0] for _ in range(2)]
        del optimizer
        return [*out, torch.rand(3)]

    for a, b in zip(outputs(False), outputs(True), strict=True):
        assert torch.equal(a, b)


def test_a_product_of_many_inputs_is_refused():
    with pytest.warns(UserWarning, match="'weight' is bilinear with 10,000 products of inputs, more than 4,096"):
        precond.whitening(nn.Bilinear(100, 100, 2))
