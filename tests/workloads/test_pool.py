"""The pool: every task can be trained, data and models are what their words say, and halves are kept apart."""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from precond.lab.workloads import Plan, peers, train
from precond.lab.workloads.pool import (
    BLIND,
    CONFIRMATION,
    DEVELOPMENT,
    FINAL,
    HELD_OUT,
    LOCKED,
    OPENED,
    POOL,
    REFERENCE,
    SEALED,
    pool_tasks,
    tasks,
)
from precond.lab.workloads.pool.drawings import SHAPES, shapes
from precond.lab.workloads.pool.finetuning import LoRA, trained, with_lora
from precond.lab.workloads.pool.language import Llama, RotaryAttention, gpt
from precond.lab.workloads.pool.physics import EQUATIONS, Residual
from precond.lab.workloads.pool.recurrent import CharacterLSTM, lorenz
from precond.lab.workloads.pool.renewed import SIGNS, FactorizationMachine, pendulums, sums
from precond.lab.workloads.pool.tasks import BEYOND, SEEDS, TRIALS, entrants
from precond.lab.workloads.randomness import isolated

MEMBERS = {member.name: member for member in POOL}
ADAMW = entrants()[0][1]


def test_each_task_is_in_one_list_and_each_family_in_both_halves() -> None:
    assert len(MEMBERS) == len(POOL) >= 24
    assert sorted(DEVELOPMENT + LOCKED + OPENED + CONFIRMATION + HELD_OUT + SEALED + FINAL + BLIND) == sorted(MEMBERS)
    of_halves = [
        Counter(MEMBERS[name].family for name in half)
        for half in (DEVELOPMENT, LOCKED, HELD_OUT, CONFIRMATION, SEALED, FINAL, BLIND)
    ]
    assert len(of_halves[0]) >= 8 and all(set(of_halves[0]) == set(of_halves[i]) for i in (1, 2, 4, 5, 6))
    # The third set has no net that was trained before.
    assert set(of_halves[3]) == set(of_halves[0]) - {"fine-tuning"}


@pytest.mark.parametrize("name", list(MEMBERS))
def test_every_task_can_be_trained(name: str) -> None:
    workload = MEMBERS[name].workload()
    assert set(workload.parts) == {"train", "validation", "test"}
    assert workload.facts["data"] and workload.facts["model"] and workload.facts["loss"]
    small = dataclasses.replace(workload, parts={k: p[torch.arange(min(64, len(p)))] for k, p in workload.parts.items()})
    outcome, _ = train(small, ADAMW, Plan(1e-3, 2, 3, evaluations=1))
    assert outcome.status == "finished" and outcome.test_loss is not None
    assert all(math.isfinite(loss) for loss in outcome.curve.train_loss + outcome.curve.validation_loss)
    if "raw" in name:
        return
    train_part = small.parts["train"]
    with isolated(3), torch.no_grad():
        outputs = small.make()(train_part.inputs)
    first = small.loss_fn(outputs, train_part.targets).item()
    # Before training outputs are close to even; nets that were trained before know something.
    if small.loss_fn is F.cross_entropy and "LoRA" not in name and "tuned" not in name:
        assert first == pytest.approx(math.log(outputs.shape[1]), rel=0.12)
    # Standardized targets have a square of about 1; a recommender's net starts near 0.
    if small.metric == "R²":
        assert first == pytest.approx(1, rel=0.5)


def test_rules_are_the_same_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    made = pool_tasks("development", SEEDS, TRIALS, 0.1)
    assert [task.name for task in made] == list(DEVELOPMENT)
    for task in made:
        assert len(task.seeds) >= 5 and task.search_seed not in task.seeds
        assert (task.search.trials, task.search.beyond, task.search.judge, task.search.aim) == (
            TRIALS,
            BEYOND,
            "training",
            "steps",
        )
        assert (task.plan.decay, task.plan.warmup) == ("cosine", task.plan.steps // 20)
        assert task.reference == REFERENCE and task.allowance == 0.0 and task.family
        for contender in task.contenders:
            rates = contender.lr.first(TRIALS)  # type: ignore[union-attr]
            assert all(b / a == pytest.approx(2, rel=1e-3) for a, b in itertools.pairwise(rates))
    # Everyone's own default is among its rates.
    defaults = {
        "torch AdamW": 1e-3,
        "torch AdamW, β₂ = 0.95": 1e-3,
        "torch Muon": 1e-3,
        "pytorch-optimizer SOAP": 3e-3,
        "auto": 2e-2,
        "AdamW, averaged": 1e-3,
        "auto, averaged": 2e-2,
    }
    for _, entrant, space in entrants():
        assert defaults[entrant.label] in space.first(TRIALS)
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    (task, *_) = pool_tasks("development", (0,), 1, 0.1)
    assert "pytorch-optimizer SOAP" not in [c.label for c in task.contenders]
    assert task.numbers == (0, 1, 2, 4, 5, 6)  # files keep their names
    assert task.skipped and "pip install 'precond[bench]'" in task.skipped[0]


def test_data_are_the_same_each_time_and_parts_are_apart() -> None:
    shown, again = shapes(75), shapes.__wrapped__(75)
    assert all(torch.equal(shown[k].inputs, again[k].inputs) for k in shown)
    images = torch.cat([part.inputs for part in shown.values()]).flatten(1)
    assert len(images.unique(dim=0)) == len(images)
    assert set(shown["train"].targets.tolist()) == set(range(len(SHAPES)))
    assert abs(images.mean()) < 0.2
    # Without noise the same shapes are what the noisy images show.
    assert (shapes(75, noise=0.0)["train"].inputs - shown["train"].inputs).std() == pytest.approx(0.25, rel=0.02)


def _sines(k: int, more: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, y: (math.pi * x).sin() * (k * math.pi * y).sin() + more * (3 * math.pi * x).sin() * (2 * math.pi * y).sin()


# Solutions with other boundary values than the equation's own serve as well.
SOLUTIONS: list[tuple[str, Callable[[Tensor, Tensor], Tensor]]] = [
    ("Poisson", _sines(1, 0.25)),
    ("Helmholtz", _sines(4, 0.0)),
    ("Burgers", lambda x, t: 0.3 - 0.2 * (0.2 * (x - 0.3 * t) / 0.04).tanh()),  # a front that travels
    ("wave", lambda x, t: (math.pi * x).sin() * (math.pi * t).cos()),
    ("Allen-Cahn", lambda x, t: (10 * x).tanh()),  # a front that stands
    ("Allen-Cahn", lambda x, t: 1 / (1 + 3 * (-4 * t).exp()).sqrt()),  # no front
]


@pytest.mark.parametrize(("name", "solution"), SOLUTIONS)
def test_solutions_solve_the_equation(name: str, solution: Callable[[Tensor, Tensor], Tensor]) -> None:
    """By central differences in float64: h² times third and fourth derivatives, 1e-6 · (4π)⁴ / 12 at most, is below 3e-3."""
    equation, h = EQUATIONS[name], 1e-3
    x, y = torch.rand(2, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def u(a: float, b: float) -> Tensor:
        return solution(x + a, y + b)

    first = [(u(a, b) - u(-a, -b)) / (2 * h) for a, b in ((h, 0), (0, h))]
    second = [(u(a, b) - 2 * u(0, 0) + u(-a, -b)) / h**2 for a, b in ((h, 0), (0, h))]
    found = equation.operator(u(0, 0), *first, *second)
    torch.testing.assert_close(found, equation.source(x, y), rtol=0, atol=3e-3)


@pytest.mark.parametrize("name", list(EQUATIONS))
def test_residuals_are_those_of_differences(name: str) -> None:
    """Central differences in float64, h = 1e-4: roundings 1e-16/h² = 1e-8, times derivatives of the net."""
    torch.manual_seed(0)
    equation, h = EQUATIONS[name], 1e-4
    model = Residual(equation, (8, 8)).double()
    low, high = (torch.tensor(corner, dtype=torch.float64) for corner in (equation.low, equation.high))
    points = low + (high - low) * (0.1 + 0.8 * torch.rand(10, 2, dtype=torch.float64))

    def u(a: float, b: float) -> Tensor:
        moved = points + torch.tensor([a, b], dtype=torch.float64)
        x, y = moved.split(1, 1)
        return equation.field(model.head(model.body((moved - model.middle) / model.scale)), x, y)

    with torch.no_grad():
        first = [(u(a, b) - u(-a, -b)) / (2 * h) for a, b in ((h, 0), (0, h))]
        second = [(u(a, b) - 2 * u(0, 0) + u(-a, -b)) / h**2 for a, b in ((h, 0), (0, h))]
        expected = equation.operator(u(0, 0), *first, *second)
        found = model(points)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "at", "value"), [
    ("Poisson", (0.0, 0.3), 0.0), ("Helmholtz", (0.4, 1.0), 0.0), ("Burgers", (1.0, 0.5), 0.0), ("Burgers", (0.5, 0.0), -1.0),
    ("wave", (0.5, 0.0), 1.0), ("wave", (1.0, 0.6), 0.0),
    ("Allen-Cahn", (-1.0, 0.7), -1.0), ("Allen-Cahn", (0.25, 0.0), 0.0625 * math.cos(math.pi / 4)),
])  # fmt: skip
def test_boundary_values_hold_whatever_the_net_says(name: str, at: tuple[float, float], value: float) -> None:
    x, y = (torch.tensor([c], dtype=torch.float64) for c in at)
    for n in (-7.0, 0.0, 3.0):
        assert EQUATIONS[name].field(torch.tensor([n], dtype=torch.float64), x, y).item() == pytest.approx(value, abs=1e-12)


def test_the_series_is_that_of_lorenz() -> None:
    """scipy's integrator at 1e-10. Steps of h = 0.01 err by h⁴ times fifth derivatives, which are large off the attractor; x is about 8."""
    integrate = pytest.importorskip("scipy.integrate", reason="scipy is not installed")
    found = lorenz(3, 2, 10)
    generator = torch.Generator().manual_seed(3)
    starts = torch.randn(2, 3, dtype=torch.float64, generator=generator) * 8 + torch.tensor([0.0, 0.0, 25.0])

    def slope(_: float, s: list[float]) -> list[float]:
        return [10 * (s[1] - s[0]), s[0] * (28 - s[2]) - s[1], s[0] * s[1] - 8 / 3 * s[2]]

    times = [0.04 * (51 + i) for i in range(10)]
    for series, start in zip(found, starts, strict=True):
        exact = integrate.solve_ivp(slope, (0, times[-1]), start.tolist(), t_eval=times, rtol=1e-10, atol=1e-10).y[0]
        torch.testing.assert_close(series, torch.from_numpy(exact), rtol=0, atol=0.05)


def test_pendulums_keep_their_energy_but_for_damping_and_sums_are_right() -> None:
    angles = pendulums(3, 200, 40)
    assert angles.abs().max() < math.pi and angles[:, 30:].std() < angles[:, :10].std()
    for line in sums(4, 20).inputs:
        whole = "".join(SIGNS[i] for i in line).split(";")[:-1]
        assert len(whole) >= 3
        for equation in whole:
            left, right = equation.split("=")
            assert sum(map(int, left.split("+"))) == int(right)


def test_a_factorization_machine_has_the_products_of_all_pairs() -> None:
    torch.manual_seed(0)
    model = FactorizationMachine((5, 4, 3), 2)
    codes = torch.tensor([[1, 2, 0], [4, 0, 2]])
    v = [table.weight[codes[:, i]] for i, table in enumerate(model.vectors)]
    pairs = sum((a * b).sum(1) for i, a in enumerate(v) for b in v[i + 1 :])
    biases = sum(table.weight[codes[:, i], 0] for i, table in enumerate(model.biases))
    torch.testing.assert_close(model(codes)[:, 0], pairs + biases + model.deep(torch.cat(v, 1))[:, 0])


def test_llama_is_causal_tied_and_relative() -> None:
    torch.manual_seed(0)
    model = Llama(11, 8, 16, 2, 2)
    assert model.head.weight is model.token.weight
    tokens = torch.randint(11, (2, 8))
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 11
    before, after = model(tokens), model(changed)
    assert torch.allclose(before[..., :5], after[..., :5], atol=1e-6) and not torch.allclose(before[..., 5:], after[..., 5:])
    attention = RotaryAttention(16, 2, 32).double()
    attention.cos, attention.sin = attention.cos.double(), attention.sin.double()
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    q, k = q.expand(1, 1, 32, 8), k.expand(1, 1, 32, 8)
    scores = (attention._turned(q) @ attention._turned(k).transpose(-1, -2))[0, 0]
    for shift in (1, 9):
        assert torch.allclose(scores.diagonal(-shift), scores[shift, 0], atol=1e-6)  # angles are float32
    assert not torch.allclose(scores[1, 0], scores[9, 0])


def test_lora_begins_as_the_frozen_net_and_moves_alone() -> None:
    torch.manual_seed(0)
    model = gpt()
    tokens = torch.randint(96, (2, 8))
    before, frozen = model(tokens).detach(), {name: p.detach().clone() for name, p in model.named_parameters()}
    with_lora(model, rank=2, alpha=4)
    assert torch.allclose(model(tokens), before, atol=1e-6)
    moving = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(moving) == 2 * 2 * 6 and all(".down." in name or ".up." in name for name in moving)
    optimizer = peers.muon(model, 0.1)
    model(tokens).square().mean().backward()
    optimizer.step()
    named = dict(model.named_parameters())
    for name, old in frozen.items():
        now = (
            named[name] if name in named else named[name.replace(".weight", ".frozen.weight").replace(".bias", ".frozen.bias")]
        )
        assert torch.equal(now, old), name
    layer = next(m for m in model.modules() if isinstance(m, LoRA))
    dense = layer.frozen.weight + layer.scale * layer.up.weight @ layer.down.weight
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x), F.linear(x, dense, layer.frozen.bias), rtol=1e-4, atol=1e-5)


def test_what_is_trained_before_is_the_same_each_time_and_leaves_the_generators_alone() -> None:
    part = shapes(75)["test"]
    part = dataclasses.replace(part, inputs=part.inputs[:64].flatten(1), targets=part.targets[:64])
    torch.manual_seed(5)
    before = torch.get_rng_state()
    states = [trained(lambda: nn.Linear(256, len(SHAPES)), part, 16, 9, 0.01) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_muon_takes_recurrent_matrices_and_neither_embeddings_nor_a_tied_head() -> None:
    for model in (CharacterLSTM(11, 8, 1), Llama(11, 8, 8, 1, 2)):
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = peers.muon(model, 0.01)
        F.cross_entropy(model(torch.randint(11, (4, 8))), torch.randint(11, (4, 8))).backward()
        optimizer.step()
        for name, p in model.named_parameters():
            step = p.detach() - start[name]
            if p.ndim == 2 and "token" not in name and "head" not in name:
                # Five Newton-Schulz steps bring most singular values near to one; a step of Adam or of the gradient leaves them far apart.
                values = torch.linalg.svdvals(step)
                assert values.median() > 0.5 * values.max(), name
            else:
                # Adam's first step, where the gradient is not tiny.
                assert step.abs().max() == pytest.approx(0.01, rel=0.01), name
                assert step.abs()[step != 0].median() == pytest.approx(0.01, rel=0.01), name


def test_muon_of_tables_alone_is_adamw():
    """As a recommender that has nothing else: torch's Muon takes no empty list."""
    table = nn.Embedding(5, 3)
    optimizer = peers.muon(table, 0.01)
    table(torch.tensor([1, 2])).square().sum().backward()
    optimizer.step()
    (group,) = optimizer.param_groups
    assert group["params"] == [table.weight] and "betas" in group
