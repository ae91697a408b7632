"""The monitor's numbers against dense computations, and runs with it bit for bit as runs without."""

from __future__ import annotations

import copy
import json
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import precond
from alike import alike
from precond import BNP, RMS, SAM, PreconditionedGD
from precond.analysis.curvature import Objective, hessian
from precond.analysis.diagnostics import Monitor, TensorBoard, preconditioner_of
from precond.analysis.diagnostics.online import kappa_of_moments, top_eigenpair
from precond.optim.inputs import Moments


def net(dtype=torch.float32):
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 3)]
    return nn.Sequential(*layers).to(dtype)


def data(dtype=torch.float32, n=40):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 6, generator=generator).to(dtype) * 3 + 1, torch.randint(0, 3, (n,), generator=generator)


def plain(model, optimizer, x, y):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()


def with_closure(model, optimizer, x, y):
    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)


def two_calls(model, optimizer, x, y):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    while optimizer.probe():
        nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()


RUNS = {
    "SGD with momentum": (lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9), plain),
    "torch AdamW": (lambda m: torch.optim.AdamW(m.parameters(), lr=0.01), plain),
    "torch Adam, closure": (lambda m: torch.optim.Adam(m.parameters(), lr=0.01), with_closure),
    "adamw": (lambda m: precond.adamw(m, lr=0.01), plain),
    "BNP∘RMS": (lambda m: PreconditionedGD(m, lr=0.01, preconditioner=BNP() @ RMS()), plain),
    "whitening": (lambda m: precond.whitening(m, lr=0.01), plain),
    "SAM, closure": (lambda m: precond.adam(m, lr=0.01, regularizers=[SAM(0.05)]), with_closure),
    "SAM, two calls": (lambda m: precond.adam(m, lr=0.01, regularizers=[SAM(0.05)]), two_calls),
}


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("run", RUNS)
def test_the_run_is_the_same_bit_for_bit(run, mode):
    make, train = RUNS[run]

    def trained(every):
        model = net()
        optimizer = make(model)
        monitor = None
        if every:
            x, y = data()
            objective = Objective(model, nn.functional.cross_entropy, [(x, y)], mode=mode, seed=0)
            monitor = Monitor(objective, every, [lambda metrics, step: torch.rand(3)]).attach(optimizer)
        torch.manual_seed(7)
        for _ in range(6):
            x, y = torch.randn(16, 6), torch.randint(0, 3, (16,))
            train(model, optimizer, x, y)
        grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        return monitor, (model.state_dict(), optimizer.state_dict()["state"], grads, torch.get_rng_state(), model.training)

    _, without = trained(None)
    for every in (1, 4):
        monitor, watched = trained(every)
        assert monitor.last["lambda_max"] > 0
        assert alike(watched, without)


def test_the_numbers():
    model = net(torch.float64)
    x, y = data(torch.float64)
    objective = Objective(model, nn.functional.cross_entropy, [(x[:25], y[:25]), (x[25:], y[25:])])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    monitor = Monitor(objective, 1, products=4).attach(optimizer)
    for _ in range(8):
        before = nn.utils.parameters_to_vector(model.parameters()).detach()
        plain(model, optimizer, x, y)
    found = monitor.last
    p = nn.utils.parameters_to_vector(model.parameters()).detach()
    assert found["update_ratio"] == pytest.approx(float((p - before).norm() / p.norm()), rel=1e-10)
    assert found["loss"] == pytest.approx(objective.value(), rel=1e-12)
    g = torch.cat([t.flatten() for t in objective.gradient()]).numpy()
    P = preconditioner_of(optimizer, objective).to_dense().numpy()
    H = hessian(objective).to_dense().numpy()
    assert found["grad_norm"] == pytest.approx(np.linalg.norm(g))
    assert found["grad_norm_z"] == pytest.approx(np.linalg.norm(P.T @ g))
    Mg = P @ P.T @ g
    assert found["alignment"] == pytest.approx(g @ Mg / np.linalg.norm(g) / np.linalg.norm(Mg))
    values = np.linalg.eigvalsh(P.T @ H @ P)
    assert found["lambda_max"] == pytest.approx(values[-1], rel=0.02)
    assert found["lambda_max"] <= values[-1] * (1 + 1e-9)
    assert abs(values - found["lambda_max"]).min() <= found["lambda_max_error"] * (1 + 1e-6)
    assert found["lr"] == 0.01 and found["lr_limit"] == pytest.approx(19 * 2 / found["lambda_max"])
    assert found["lr_ratio"] == pytest.approx(0.01 / found["lr_limit"])
    assert [name for name in found if name.startswith("inputs/")] == ["inputs/0", "inputs/4"]
    h = np.concatenate([np.ones((40, 1)), x.numpy()], axis=1)
    A = h.T @ h / 40
    A[1:, 1:] = np.diag(x.numpy().var(0)) + np.outer(A[0, 1:], A[0, 1:])
    values = np.linalg.eigvalsh(A)
    assert found["inputs/0"] == pytest.approx(values[-1] / values[0], rel=1e-8)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(
    ("mean", "variance"),
    [
        ([0.3, -2.0, 5.0], [1.0, 4.0, 0.01]),
        ([0.0, 0.0, 0.0], [1.0, 4.0, 0.01]),
        ([1e4, 2e-3, 0.0], [1e6, 1e-6, 3.0]),
        ([1.0, 0.0, 7.0, 0.0], [2.0, 0.0, 0.0, 2.0]),  # dead, constant, and twice the same variance
        ([3.0], [0.5]),
        ([2.0, 2.0], [1.0, 1.0]),
        ([0.0], [2.0]),
    ],
)
def test_kappa_of_means_and_scales(mean, variance, biased):
    m, v = torch.tensor(mean).double(), torch.tensor(variance).double()
    # The matrix is BᵀB, B = [[1, μᵀ], [0, diag(σ)]], whose singular values keep their digits.
    B = np.concatenate([m.numpy()[None], np.diag(v.numpy() ** 0.5)])
    if biased:
        B = np.concatenate([np.eye(len(B))[:, :1], B], axis=1)
    s = np.linalg.svd(B, compute_uv=False)
    s = s[s > 1e-13 * s[0]]
    expected = (s[0] / s[-1]) ** 2
    moments = Moments(torch.tensor([9.0]), m[None], v[None], v[None], torch.tensor(9.0))
    assert kappa_of_moments(moments, biased) == pytest.approx(expected, rel=1e-7)
    other = Moments(
        torch.tensor([9.0, 9.0]),
        torch.stack([m, torch.zeros_like(m)]),
        torch.stack([v, torch.ones_like(v)]),
        v,
        torch.tensor(9.0),
    )
    assert kappa_of_moments(other, biased) == pytest.approx(max(expected, 1.0), rel=1e-7)


def test_nothing_that_varies_has_no_kappa():
    zero = torch.zeros(1, 3).double()
    assert math.isnan(kappa_of_moments(Moments(torch.tensor([1.0]), zero, zero, zero, torch.tensor(1.0)), False))
    assert kappa_of_moments(Moments(torch.tensor([1.0]), zero, zero, zero, torch.tensor(1.0)), True) == 1.0


def test_lanczos_from_a_warm_start():
    torch.manual_seed(0)
    Q, _ = torch.linalg.qr(torch.randn(60, 60).double())
    values = torch.cat([torch.linspace(0, 5, 59), torch.tensor([8.0])]).double()
    like = (torch.zeros(60).double(),)
    A = precond.Dense(Q @ torch.diag(values) @ Q.T, like)
    start, errors = (torch.randn(60).double(),), []
    for _ in range(6):
        top = top_eigenpair(A, start, 3)
        start = top.vector
        errors.append(8 - top.value)
        assert errors[-1] + 1e-12 >= 0 and abs(values - top.value).min() <= top.residual + 1e-12
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-3
    assert top_eigenpair(precond.Dense(3 * torch.eye(60).double(), like), start, 5).value == pytest.approx(3.0)


def test_every_and_the_budget(monkeypatch):
    model = net()
    objective = Objective(model, nn.functional.cross_entropy, [data()])
    optimizer, steps = torch.optim.SGD(model.parameters(), lr=0.1), []
    with Monitor(objective, 3, [lambda metrics, step: steps.append(step)]).attach(optimizer):
        for _ in range(10):
            plain(model, optimizer, *data())
    assert steps == [3, 6, 9]
    plain(model, optimizer, *data())
    assert steps == [3, 6, 9]

    # A clock on which a step takes 1 and a measurement 4: with a budget of 5 % one in 80 steps.
    now = [0.0]
    monkeypatch.setattr("precond.analysis.diagnostics.monitor.time.perf_counter", lambda: now[0])
    steps = []

    def sink(metrics, step):
        steps.append(step)
        now[0] += 4.0

    monitor = Monitor(objective, "auto", [sink]).attach(optimizer)
    for _ in range(400):
        now[0] += 1.0
        optimizer.step()
    assert steps[0] == 1 and np.diff(steps).tolist() == [161, 80, 80]  # the first one in advance
    assert monitor._own_seconds <= 0.05 * monitor._train_seconds


def test_sinks(tmp_path):
    class Writer:
        def __init__(self):
            self.rows = []

        def add_scalar(self, name, value, step):
            self.rows.append((name, value, step))

    model, writer = net(), Writer()
    optimizer = precond.adam(model)
    objective = Objective(model, nn.functional.cross_entropy, [data()])
    path = tmp_path / "runs" / "monitor.jsonl"
    with Monitor(objective, 1, [path, writer, TensorBoard(writer, "other/")]).attach(optimizer) as monitor:
        for _ in range(2):
            plain(model, optimizer, *data())
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and rows[1]["loss"] == monitor.last["loss"]
    assert ("precond/loss", monitor.last["loss"], 2) in writer.rows and ("other/lr", 1e-3, 2) in writer.rows
    for bad in (3, None):
        with pytest.raises(TypeError, match="a sink must be a path, a SummaryWriter, or a function"):
            Monitor(objective, 1, [bad])


def test_what_is_not_finite_is_null(tmp_path):
    from precond.analysis.diagnostics import Jsonl

    sink = Jsonl(tmp_path / "m.jsonl")
    sink({"a": math.nan, "b": math.inf, "c": 1.0}, 3)
    sink.close()
    assert json.loads((tmp_path / "m.jsonl").read_text()) == {"step": 3, "a": None, "b": None, "c": 1.0}


def test_a_failing_sink_is_reported_once_and_asked_again():
    model, asked, good = net(), [], []

    def fails(metrics, step):
        asked.append(step)
        raise OSError("disk full")

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    objective = Objective(model, nn.functional.cross_entropy, [data()])
    Monitor(objective, 1, [fails, lambda metrics, step: good.append(step)]).attach(optimizer)
    with pytest.warns(
        UserWarning, match=r"sink 0 \(function\) failed at step 1, training goes on: OSError: disk full"
    ) as caught:
        for _ in range(3):
            plain(model, optimizer, *data())
    assert len(caught) == 1 and asked == good == [1, 2, 3]


def test_a_failing_measurement_leaves_the_others():
    model = nn.Sequential(nn.Linear(6, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = data()
    target = torch.randn(40, 3)
    objective = Objective(model, lambda out, t: (out * t).mean(), [(x, target)])  # linear: no second derivative
    monitor = Monitor(objective, 1).attach(optimizer)
    with pytest.warns(UserWarning, match="λ_max failed at step 1.*NoSecondDerivative"):
        plain(model, optimizer, x, y)
    assert "lambda_max" not in monitor.last and monitor.last["grad_norm"] > 0
    with torch.no_grad():
        model[0].weight.fill_(math.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain(model, optimizer, x, y)  # diverged: reported as NaN, the warning has been given
    assert math.isnan(monitor.last["loss"])


def test_going_on_from_its_state(tmp_path):
    def run(stop):
        model = net(torch.float64)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        objective = Objective(model, nn.functional.cross_entropy, [data(torch.float64)])
        rows = []
        monitor = Monitor(objective, 2, [lambda metrics, step: rows.append((step, metrics))]).attach(optimizer)
        torch.manual_seed(3)
        for step in range(8):
            if step == stop:
                torch.save(monitor.state_dict(), tmp_path / "state.pt")
                monitor.close()
                monitor = Monitor(objective, 2, [lambda metrics, step: rows.append((step, metrics))]).attach(optimizer)
                monitor.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
            plain(model, optimizer, *data(torch.float64))
        return rows

    assert run(5) == run(None)
    model = nn.Linear(2, 2)
    other = Monitor(Objective(model, nn.functional.mse_loss, [(torch.ones(1, 2), torch.ones(1, 2))]))
    with pytest.raises(ValueError, match="other shapes"):
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))


@pytest.mark.parametrize("recipe", ["adam", "soap"])
def test_a_model_of_16_bits_going_on(recipe):
    model = net(torch.bfloat16)
    optimizer = getattr(precond, recipe)(model)
    objective = Objective(model, nn.functional.cross_entropy, [data(torch.bfloat16)])
    monitor = Monitor(objective, 1).attach(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain(model, optimizer, *data(torch.bfloat16))
    assert monitor.last["lambda_max"] > 0
    other = Monitor(objective, 1).attach(optimizer)
    other.load_state_dict(copy.deepcopy(monitor.state_dict()))
    assert alike(other.state_dict()["vector"], monitor.state_dict()["vector"])  # in float32, as it is kept
    assert alike(other.measure()["lambda_max"], monitor.measure()["lambda_max"])


def test_attaching():
    model = net()
    objective = Objective(model, nn.functional.cross_entropy, [data()])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = Monitor(objective)
    with pytest.raises(RuntimeError, match="call attach"):
        monitor.measure()
    monitor.attach(optimizer)
    assert monitor.measure()["lr"] == 0.1
    with pytest.raises(RuntimeError, match="attached already"):
        monitor.attach(optimizer)
    monitor.detach()
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    with pytest.raises(TypeError, match="P of Rprop is not known"):
        monitor.attach(torch.optim.Rprop(model.parameters()))
    with pytest.raises(ValueError, match="not a parameter of this optimizer"):
        monitor.attach(torch.optim.SGD(copy.deepcopy(model).parameters()))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"every": 0}, "every must be a whole number"),
        ({"every": "often"}, "every must be"),
        ({"products": 0}, "products must be"),
        ({"budget": 0.0}, "budget must be > 0"),
        ({"sinks": print}, "put it in a list"),
        ({"sinks": "log.jsonl"}, "put it in a list"),
    ],
)
def test_bad_input(bad, message):
    model = net()
    objective = Objective(model, nn.functional.cross_entropy, [data()])
    with pytest.raises((TypeError, ValueError), match=message):
        Monitor(objective, **bad)
    with pytest.raises(TypeError, match="objective must be an Objective, got Sequential"):
        Monitor(model)
