"""A probe leaves no trace: parameters, storage, random numbers, normalization statistics, gradients; in every calling form."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch
from torch import nn

import precond
from contract.table import OWN, Net, batches, closure, flat, net, train
from precond import SAM, GradientNorm, LossClosure

PROBING = {
    "SAM in p": SAM(0.05, space="p"),
    "SAM in z": SAM(0.02),
    "forward": GradientNorm(1e-3),
    "backward in p": GradientNorm(1e-3, space="p", method="backward"),
    "central": GradientNorm(1e-3, method="central"),
}
GRADIENTS = {"SAM in p": 2, "SAM in z": 2, "forward": 2, "backward in p": 2, "central": 3}
each = pytest.mark.parametrize("name", PROBING)


def loss_of(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def two_calls(model, optimizer, data, after_backward=lambda: None):
    for t, batch in enumerate(data):
        torch.manual_seed(100 + t)
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        after_backward()
        while optimizer.probe():
            loss_of(model, batch).backward()
        optimizer.step()


@each
def test_closure_two_calls_and_loss_closure_are_one(name):
    ends, statistics = [], []
    for form in ("closure", "two calls", "loss closure"):
        model = net()
        optimizer = precond.adamw(model, lr=0.003, regularizers=[PROBING[name]])
        if form == "closure":
            train(model, optimizer, batches(6))
        elif form == "two calls":
            two_calls(model, optimizer, batches(6))
        else:
            for t, batch in enumerate(batches(6)):
                torch.manual_seed(100 + t)
                optimizer.step(LossClosure(lambda b=batch, m=model: loss_of(m, b)))
        assert optimizer.last.gradients == GRADIENTS[name]
        ends.append(flat(model))
        statistics.append(torch.cat([b.flatten() for b in model.buffers()]))
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])
    assert torch.equal(statistics[0], statistics[1])


@each
def test_gradients_are_counted(name):
    model = net()
    optimizer = precond.adamw(model, regularizers=[PROBING[name]])
    calls = 0
    run = closure(model, optimizer, batches(1)[0])

    def counted():
        nonlocal calls
        calls += 1
        return run()

    optimizer.step(counted)
    assert calls == GRADIENTS[name]


@each
def test_batch_statistics_and_random_numbers_move_as_without_a_probe(name):
    traces = []
    for regularizers in ([], [PROBING[name]]):
        model = net()
        optimizer = precond.adamw(model, lr=0.0, weight_decay=0.0, regularizers=regularizers)
        torch.manual_seed(5)
        optimizer.step(closure(model, optimizer, batches(1)[0]))
        traces.append((torch.cat([b.double().flatten() for b in model.buffers()]), torch.rand(3)))
    assert torch.equal(traces[0][0], traces[1][0]) and torch.equal(traces[0][1], traces[1][1])


@each
def test_both_passes_see_the_same_masks(name):
    model = net()
    masks: list[torch.Tensor] = []
    model.drop.register_forward_hook(lambda m, args, out: masks.append((out == 0).clone()))
    for form in ("closure", "two calls"):
        masks.clear()
        optimizer = precond.adamw(model, regularizers=[PROBING[name]])
        data = batches(1)
        train(model, optimizer, data) if form == "closure" else two_calls(model, optimizer, data)
        assert len(masks) == GRADIENTS[name] and all(torch.equal(m, masks[0]) for m in masks)


def test_a_thousand_probes_leave_float32_parameters_bit_identical_in_the_same_storage():
    model = net(torch.float32)
    optimizer = precond.adamw(model, lr=0.0, weight_decay=0.0, regularizers=[SAM(0.5)])
    before, places = flat(model), [p.data_ptr() for p in model.parameters()]
    (batch,) = batches(1, torch.float32)
    for t in range(1000):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        if t % 3 == 0:
            model.conv.bias.grad = None
        while optimizer.probe():
            loss_of(model, batch).backward()
            if t % 5 == 0:
                model.head.bias.grad = None
        if t % 7:
            optimizer.step()
        else:
            optimizer.restore()
    assert torch.equal(flat(model), before) and places == [p.data_ptr() for p in model.parameters()]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("nonfinite", ["propagate", "raise", "skip"])
@each
def test_a_closure_that_raises_in_the_second_pass_leaves_parameters_untouched(name, nonfinite, error):
    model = net()
    optimizer = precond.adamw(model, regularizers=[PROBING[name]], nonfinite=nonfinite)
    train(model, optimizer, batches(2))
    before = flat(model)
    states = [t.clone() for e in optimizer.state.values() for t in e.values()]
    run = closure(model, optimizer, batches(1)[0])
    calls = 0

    def failing():
        nonlocal calls
        calls += 1
        if calls == 2:
            raise error("stop")
        return run()

    with pytest.raises(error):
        optimizer.step(failing)
    assert torch.equal(flat(model), before) and not optimizer.probing
    after = [t for e in optimizer.state.values() for t in e.values()]
    assert all(torch.equal(a, b) for a, b in zip(states, after, strict=True))


def test_parameters_alone_warn_once_and_frozen_statistics_help():
    model = net()
    optimizer = precond.adamw(model.parameters(), regularizers=[SAM(0.05)])
    (batch,) = batches(1)
    with pytest.warns(UserWarning, match="frozen_statistics"):
        optimizer.step(closure(model, optimizer, batch))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(closure(model, optimizer, batch))
    before = model.norm.running_mean.clone()
    with precond.frozen_statistics(model), precond.frozen_statistics(model):
        loss_of(model, batch)
    assert torch.equal(model.norm.running_mean, before)


class Replacing(nn.Module):
    """A norm that replaces its buffer in each forward, with a cumulative average."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.norm = nn.BatchNorm1d(3, momentum=None)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        self.seen = self.seen + 1
        return self.head(self.norm(x))


def test_custom_and_cumulative_statistics_move_once():
    torch.manual_seed(0)
    model = Replacing()
    optimizer = precond.sgd(model, lr=0.1, regularizers=[SAM(0.1, space="p")])
    for _ in range(3):
        x, y = torch.randn(4, 3), torch.randint(0, 2, (4,))
        optimizer.step(closure(model, optimizer, (x, y)))
    assert model.seen == 3 and model.norm.num_batches_tracked == 3


@each
def test_zero_gradients_make_no_nan(name):
    p = nn.Parameter(torch.ones(3))
    optimizer = precond.PreconditionedGD([p], lr=0.1, preconditioner=precond.RMS(), regularizers=[PROBING[name]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.step(LossClosure(lambda: (0 * p).sum()))
    assert torch.equal(p.detach(), torch.ones(3))


@pytest.mark.parametrize("name", OWN)
def test_gradients_are_left_alone(name):
    model = net()
    optimizer = OWN[name](model, nonfinite="raise")
    (batch,) = batches(1)
    torch.manual_seed(0)
    loss_of(model, batch).backward()
    clean = [p.grad.clone() for p in model.parameters()]
    torch.manual_seed(0)
    optimizer.step(closure(model, optimizer, batch))
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), clean, strict=True))


@pytest.mark.parametrize("accumulate", [1, 4])
@each
def test_accumulation_in_both_passes_is_one_large_batch(name, accumulate):
    ends = []
    for parts in (1, accumulate):
        model = net(dropout=0.0)
        model.norm.eval()
        optimizer = precond.adamw(model, lr=0.003, regularizers=[PROBING[name]])
        for x, y in batches(3):

            def run(x=x, y=y, model=model, optimizer=optimizer, parts=parts):
                optimizer.zero_grad()
                for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
                    (loss_of(model, (a, b)) / parts).backward()
                return loss_of(model, (x, y))

            optimizer.step(run)
        ends.append(flat(model))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-9)


@pytest.fixture
def frozen_heap():
    """What was there before is neither collected nor listed, which takes a second each time."""
    gc.freeze()
    yield
    gc.unfreeze()


def parameter_sized() -> int:
    gc.collect()
    return sum(t.shape == (300, 200) and t.layout == torch.strided for t in gc.get_objects() if isinstance(t, torch.Tensor))


@pytest.mark.parametrize(
    ("regularizer", "nonfinite", "extra"),
    [(SAM(0.1), "propagate", 1), (SAM(0.1, space="p"), "propagate", 1), (SAM(0.1), "raise", 2), (GradientNorm(0.1), "propagate", 2),
     (GradientNorm(0.1, space="p"), "skip", 2), (GradientNorm(0.1, method="central"), "propagate", 3)],
)  # fmt: skip
@pytest.mark.parametrize("statistics", ["loss", "lagged"])
def test_buffers_alive_in_the_second_pass(regularizer, nonfinite, extra, statistics, frozen_heap):
    model = nn.Linear(200, 300, bias=False)
    options = {"regularizers": [regularizer], "nonfinite": nonfinite, "statistics_from": statistics}
    optimizer = precond.adamw(model, **options)
    x, alive = torch.randn(4, 200), []

    def run():
        optimizer.zero_grad()
        alive.append(parameter_sized())
        loss = model(x).square().mean()
        loss.backward()
        return loss

    optimizer.step(run)
    alive.clear()
    optimizer.step(run)
    first, *later = alive
    spare = 1  # the buffer that the second pass uses is kept between steps
    assert max(later) - (first - spare) == extra


def test_exact_asks_for_one_gradient_and_a_loss_closure():
    model = net()
    optimizer = precond.adamw(model, regularizers=[GradientNorm(1e-3, method="exact")])
    (batch,) = batches(1)
    optimizer.step(LossClosure(lambda: loss_of(model, batch)))
    assert optimizer.last.gradients == 1
    with pytest.raises(TypeError, match="LossClosure"):
        optimizer.step(closure(model, optimizer, batch))


def test_one_optimizer_for_a_copied_model():
    import copy
    import pickle

    model = net()
    optimizer = precond.adamw(model, regularizers=[SAM(0.05)])
    train(model, optimizer, batches(2))
    twin = copy.deepcopy(model)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(flat(twin), flat(model)) and torch.equal(flat(again), flat(model))
    twin(batches(1)[0][0])
    del optimizer
    gc.collect()
    assert not model._forward_pre_hooks


def test_net_is_what_second_passes_can_spoil():
    assert {type(m) for m in Net().modules()} >= {nn.Dropout, nn.BatchNorm2d}


class _Alike(nn.Module):
    """Two layers of one shape, of which a step may use one."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1)

    def forward(self, x, both):
        h = self.first(x).tanh()
        return self.head(self.second(h).tanh() if both else h)


@pytest.mark.parametrize("regularizer", [SAM(0.05, space="p"), GradientNorm(1e-2, space="p")], ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("recipe", ["adamw", "muon", "shampoo", "soap"])
def test_a_layer_whose_cleared_gradient_stays_zero_is_probed_with_those_alike(recipe, regularizer):
    """``zero_grad(set_to_none=False)`` leaves it zero in the first pass, and ``probe()`` None for the second."""
    ends = []
    for engine in ("auto", "loop"):
        torch.manual_seed(0)
        model = _Alike().double()
        optimizer = precond.RECIPES[recipe](model, lr=0.01, regularizers=[regularizer], engine=engine)
        for both in (True, False, False, True):
            x = torch.randn(8, 3, dtype=torch.float64)
            optimizer.zero_grad(set_to_none=False)
            model(x, both).square().mean().backward()
            while optimizer.probe():
                model(x, both).square().mean().backward()
            optimizer.explain()
            optimizer.step()
        steps = torch.tensor([float(s["step"]) for s in optimizer.state.values()], dtype=torch.float64)
        ends.append(torch.cat([flat(model), steps]))
    torch.testing.assert_close(*ends, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("at", ["the other point", "the end"])
def test_what_is_frozen_between_probe_and_step_gives_the_probe_up(at):
    torch.manual_seed(0)
    model = _Alike()
    optimizer = precond.soap(model, regularizers=[SAM(0.05)])
    x, before = torch.randn(8, 3), flat(model).clone()

    def backward():
        model(x, True).square().mean().backward()

    backward()
    assert optimizer.probe()
    if at == "the end":
        backward()
        assert not optimizer.probe()
    with pytest.raises(RuntimeError, match="a probe is under way"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    model.second.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"changed between probe\(\) and step\(\)"):
        optimizer.step()
    assert torch.equal(flat(model), before) and not optimizer.probing
    optimizer.zero_grad()
    backward()
    while optimizer.probe():
        backward()
    optimizer.step()
    assert not torch.equal(flat(model), before)
